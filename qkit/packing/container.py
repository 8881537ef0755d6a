"""One file of named tensors, each entropy coded without loss.

All numbers are little-endian and unsigned; nothing is aligned::

    bytes  field
    8      magic "QKITCODE"
    2      version 1
    4      bytes of the header h
    h      header: JSON, deflated (RFC 1950)
    4      CRC-32 of all the above (RFC 1952)
    ...    the sections of :mod:`qkit.packing.entropy`, one after the other, and nothing behind them

The header is an object of two fields: ``meta``, which is the writer's, and ``tensors``, which has
for each tensor ``name: [dtype, shape, coding, [bytes of each of its sections]]``, in the order of
the sections. With ``n`` values of ``w`` bytes in row-major order, a ``coding`` is

===============  ==================================================================================
``bytes``        one section: the ``n w`` bytes as they are
``planes``       ``w`` sections of ``n`` bytes: the first byte of every value, the second, ...
                 (the exponents of floats have much less than 8 bits of information)
``sparse``       a section of ``n`` bytes, 1 where a value has any bit set and 0 elsewhere, then
                 the planes of the former
``bits-B-N``     packed words (:mod:`qkit.packing.bits`) of rows of ``N`` codes of ``B`` bits: one
                 section of the codes, a byte each
``fill-HEX``     no section: at most 64 values, all of these bytes
===============  ==================================================================================

A section is self-describing and has checksums of its own, so that a damaged file is refused, and
what it makes a reader allocate is bounded by its size.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit.errors import InputError, UsageError
from qkit.packing import entropy
from qkit.packing.bits import pack, packed_words, unpack
from qkit.packing.entropy.section import MAX_ELEMENTS
from qkit.spec.plain import show, take

MAGIC, VERSION = b"QKITCODE", 1
PREFIX = struct.Struct("<8sHI")
CRC_BYTES = 4
MAX_HEADER = 1 << 26
MAX_FILL = 64

Bytes = NDArray[np.uint8]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_CODING = re.compile(r"bytes|planes|sparse|bits-([1-8])-([1-9]\d{0,14})|fill-((?:[0-9a-f]{2})+)")


@dataclass(frozen=True)
class Part:
    """How one tensor is stored: the entry of the header, and where its sections begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    coding: str
    sizes: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """What its sections take."""
        return sum(self.sizes)

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Container:
    """A file whose header has been checked, and its sections, which have not."""

    meta: dict[str, Any]
    parts: dict[str, Part]
    data: memoryview
    header_bytes: int

    def sections(self, name: str) -> Iterator[memoryview]:
        """The sections of one tensor."""
        at = self.parts[name].start
        for size in self.parts[name].sizes:
            yield self.data[at : at + size]
            at += size

    def tensor(self, name: str) -> Tensor:
        """One tensor; :class:`~qkit.errors.InputError` if its sections do not hold it."""
        try:
            return _decode(self.parts[name], list(self.sections(name)))
        except InputError as error:
            raise InputError(str(error), where=name) from error

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.tensor(name) for name in self.parts}


def dumps(
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    packed: Mapping[str, tuple[int, int]] | None = None,
) -> bytes:
    """The file of ``tensors`` and ``meta`` (plain data); each tensor in its smallest coding.

    ``packed`` tells of tensors of packed words how many bits and how many codes a row has.
    """
    entries: dict[str, list[Any]] = {}
    sections: list[bytes] = []
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        coding, own = _encode(tensor, (packed or {}).get(name))
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError("a container has no tensors of this type", where=name, got=dtype)
        entries[name] = [dtype, list(tensor.shape), coding, [len(section) for section in own]]
        sections += own
    text = json.dumps({"meta": dict(meta), "tensors": entries}, separators=(",", ":"))
    if len(text) > MAX_HEADER:
        raise UsageError("too many tensors for a container", got=f"a header of {len(text)} bytes")
    header = zlib.compress(text.encode(), 9)
    head = PREFIX.pack(MAGIC, VERSION, len(header)) + header
    return b"".join([head, zlib.crc32(head).to_bytes(CRC_BYTES, "little"), *sections])


def is_container(path: str | Path) -> bool:
    """Whether the file ``path`` begins like a container."""
    path = Path(path)
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def loads(data: bytes | memoryview) -> Container:
    """Check all but the sections; :class:`~qkit.errors.InputError` if anything is not as stated."""
    data = memoryview(data).cast("B")
    if len(data) < PREFIX.size:
        raise _corrupt(f"{len(data)} bytes are less than a header")
    magic, version, size = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise _corrupt(f"it begins with {bytes(magic)!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise _corrupt(f"version {version} is not known to this version of qkit")
    end = PREFIX.size + size
    if len(data) < end + CRC_BYTES:
        raise _corrupt("it ends in its header")
    if zlib.crc32(data[:end]) != int.from_bytes(data[end : end + CRC_BYTES], "little"):
        raise _corrupt("the checksum of the header is wrong")
    meta, entries = take(
        _header(data[PREFIX.size : end]), "coded file", {"meta": dict, "tensors": dict}
    )
    at, parts = end + CRC_BYTES, {}
    for name, entry in entries.items():
        parts[name] = _part(name, entry, at)
        at += parts[name].bytes
    if at != len(data):
        raise _corrupt(f"{len(data)} bytes, {at} stated")
    return Container(meta, parts, data, end + CRC_BYTES)


def open_container(path: str | Path) -> Container:
    """:func:`loads` of a file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    try:
        return loads(data)
    except InputError as error:
        raise InputError(str(error), where=str(path)) from error


def _corrupt(problem: str) -> InputError:
    return InputError(f"corrupt coded file: {problem}")


def _header(data: memoryview) -> Any:
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data, MAX_HEADER)
        if not inflate.eof or inflate.unused_data:
            raise _corrupt("the header does not end where it should")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise _corrupt(f"its header: {error}") from error


def _part(name: str, entry: object, start: int) -> Part:
    """One entry of the header, checked."""
    if not isinstance(entry, list) or len(entry) != 4:
        raise _corrupt(f"the entry of {name}: {show(entry)}")
    dtype, shape, coding, sizes = entry
    if not all(
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in (shape, sizes)
    ):
        raise _corrupt(f"the entry of {name}: {show(entry)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt(f"the type of {name}: {show(dtype)}")
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise _corrupt(f"the shape of {name}: {show(shape)}")
    match = _CODING.fullmatch(coding) if isinstance(coding, str) else None
    if match is None:
        raise _corrupt(f"the coding of {name}: {show(coding)}")
    part = Part(DTYPES[dtype], tuple(shape), match[0], tuple(sizes), start)
    width = part.dtype.itemsize
    counts = {"bytes": 1, "planes": width, "sparse": 1 + width}
    wanted = counts.get(match[0], 0 if match[3] else 1)
    fits = len(sizes) == wanted
    if match[1]:
        words = packed_words(int(match[2]), int(match[1]))
        fits = fits and part.dtype == torch.int32 and part.shape[-1:] == (words,)
    if match[3]:
        fits = fits and part.numel <= MAX_FILL and len(match[3]) == 2 * width
    if not fits:
        raise _corrupt(f"the entry of {name}: {show(entry)}")
    return part


def _bytes_of(tensor: Tensor) -> Bytes:
    """``[n, w]``."""
    flat: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(-1, tensor.element_size())


def _encode(tensor: Tensor, packed: tuple[int, int] | None) -> tuple[str, list[bytes]]:
    """The smallest coding of a contiguous tensor, and its sections."""
    if packed is not None:
        bits, n = packed
        codes = unpack(tensor, bits, n, signed=False)
        return f"bits-{bits}-{n}", [entropy.encode(codes.flatten())]
    values = _bytes_of(tensor)
    if 0 < len(values) <= MAX_FILL and (values == values[0]).all():
        return f"fill-{values[0].tobytes().hex()}", []
    found = [("bytes", [entropy.encode(values.reshape(-1))])]
    if tensor.element_size() > 1:
        found.append(("planes", _planes(values)))
    present = values.any(axis=1)
    if not present.all():
        mask = entropy.encode(present.astype(np.uint8))
        found.append(("sparse", [mask, *_planes(values[present])]))
    return min(found, key=lambda each: sum(map(len, each[1])))


def _planes(values: Bytes) -> list[bytes]:
    return [entropy.encode(np.ascontiguousarray(plane)) for plane in values.T]


def _decode(part: Part, sections: list[memoryview]) -> Tensor:
    n, width = part.numel, part.dtype.itemsize
    match = _CODING.fullmatch(part.coding)
    assert match is not None
    if match[1]:
        bits, columns = int(match[1]), int(match[2])
        rows = part.shape[:-1]
        codes = _section(sections[0], math.prod(rows) * columns)
        if codes.size and int(codes.max()) >> bits:
            raise _corrupt(f"codes of more than {bits} bits")
        return pack(torch.from_numpy(codes).reshape(*rows, columns), bits)
    if match[3]:
        values = np.frombuffer(bytes.fromhex(match[3]) * n, np.uint8).reshape(n, width)
    elif part.coding == "bytes":
        values = _section(sections[0], n * width)
    elif part.coding == "planes":
        values = np.stack([_section(each, n) for each in sections], axis=1)
    else:
        present = _section(sections[0], n)
        if present.size and int(present.max()) > 1:
            raise _corrupt("a mask of other values than 0 and 1")
        count = int(np.count_nonzero(present))
        values = np.zeros((n, width), np.uint8)
        values[present != 0] = np.stack([_section(each, count) for each in sections[1:]], axis=1)
    if part.dtype == torch.bool and values.size and int(values.max()) > 1:
        raise _corrupt("a truth value that is neither 0 nor 1")
    out = torch.empty(part.shape, dtype=part.dtype)
    out.reshape(-1).view(torch.uint8).numpy()[:] = values.reshape(-1)
    return out


def _section(data: memoryview, size: int) -> Bytes:
    """The ``size`` bytes that a section holds."""
    codes = entropy.decode(data, max_elements=size)
    if codes.dtype != np.uint8 or codes.shape != (size,):
        raise _corrupt(f"a section of {codes.dtype} {codes.shape} for {size} bytes")
    return codes
