"""Coded files: exact for any tensors, as documented, and never more than an error if damaged."""

from __future__ import annotations

import copy
import json
import math
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle_entropy import decode_oracle
from torch import Tensor

from qkit.errors import InputError, UsageError
from qkit.packing import entropy, pack
from qkit.packing.container import (
    DTYPES,
    MAX_FILL,
    PREFIX,
    Container,
    dumps,
    is_container,
    loads,
    open_container,
)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat_a, flat_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any type; pruned, constant, of few values."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    n = math.prod(shape)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(["any", "zeros", "pruned", "few"]))
    top = 2 if dtype == torch.bool else 256
    raw = rng.integers(0, top, (n, dtype.itemsize), dtype=np.uint8)
    if kind == "zeros":
        raw[:] = 0
    elif kind == "pruned":
        raw[rng.random(n) < 0.9] = 0
    elif kind == "few" and n:
        raw = raw[rng.integers(0, min(n, 3), n)]
    out = torch.empty(shape, dtype=dtype)
    out.reshape(-1).view(torch.uint8).numpy()[:] = raw.reshape(-1)
    return out


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=8), tensors(), max_size=4))
def test_any_tensors_round_trip(given_tensors):
    data = dumps(given_tensors, {"what": ["ever", 1, None]})
    file = loads(data)
    assert file.meta == {"what": ["ever", 1, None]}
    assert list(file.parts) == list(given_tensors)
    assert all(same(file.tensor(name), t) for name, t in given_tensors.items())
    assert dumps(given_tensors, {"what": ["ever", 1, None]}) == data
    assert file.header_bytes + sum(part.bytes for part in file.parts.values()) == len(data)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_packed_words_round_trip(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    words = pack(torch.from_numpy(codes), bits)
    file = loads(dumps({"w": words}, {}, {"w": (bits, columns)}))
    assert file.parts["w"].coding == f"bits-{bits}-{columns}"
    assert same(file.tensor("w"), words)


def examples() -> dict[str, Tensor]:
    """One for each coding."""
    torch.manual_seed(0)
    pruned = torch.where(torch.rand(40, 50) < 0.1, torch.randn(40, 50), 0.0)
    return {
        "bytes": torch.randint(0, 9, (300,), dtype=torch.int8),
        "planes": torch.randn(500).bfloat16().float(),
        "sparse": pruned,
        "fill": torch.full((3, 7), -1.5),
        "bits": pack((torch.randn(9, 33) * 2).round().clamp(-8, 7).to(torch.int8), 4),
    }


PACKED = {"bits": (4, 33)}


def oracle(file: bytes) -> dict[str, tuple[str, NDArray]]:
    """The bytes of every value, ``[n, w]``, read as the docstring of the container says."""
    magic, version, size = struct.unpack("<8sHI", file[:14])
    assert (magic, version) == (b"QKITCODE", 1)
    entries = json.loads(zlib.decompress(file[14 : 14 + size]))["tensors"]
    at, found = 14 + size + 4, {}
    for name, (dtype, shape, coding, sizes) in entries.items():
        sections = []
        for length in sizes:
            sections.append(decode_oracle(file[at : at + length]))
            at += length
        n, w = math.prod(shape), DTYPES[dtype].itemsize
        raw = np.zeros((n, w), np.uint8)
        if coding == "bytes":
            raw = sections[0].reshape(n, w)
        elif coding.startswith("fill-"):
            raw[:] = list(bytes.fromhex(coding[5:]))
        elif coding.startswith("bits-"):
            bits, columns = map(int, coding[5:].split("-"))
            for i, row in enumerate(sections[0].reshape(-1, columns)):
                stream = sum(int(code) << (bits * j) for j, code in enumerate(row))
                row_bytes = shape[-1] * 4
                flat = np.frombuffer(stream.to_bytes(row_bytes, "little"), np.uint8)
                raw.reshape(-1, row_bytes)[i] = flat
        else:
            places = np.arange(n)
            if coding == "sparse":
                places = np.flatnonzero(sections.pop(0))
            for byte, plane in enumerate(sections):
                raw[places, byte] = plane
        found[name] = (coding, raw)
    assert at == len(file)
    return found


def test_the_layout_is_the_documented_one():
    given_tensors = examples()
    for name, (coding, raw) in oracle(dumps(given_tensors, {}, PACKED)).items():
        assert coding.startswith(name)  # each example takes the coding that it is made for
        want = given_tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        assert np.array_equal(raw.reshape(-1), want)


def test_structure_is_found():
    """What a coding saves, in bytes: never more than what is left of the information, and headers.

    A section takes some 40 bytes besides its codes, and a table less than 600.
    """
    file = loads(dumps(examples(), {}, PACKED))
    parts = file.parts
    assert parts["fill"].bytes == 0
    assert parts["planes"].bytes < 500 * 2 + 4 * 60  # two of four bytes are zero
    kept = int(examples()["sparse"].count_nonzero())
    assert parts["sparse"].bytes < kept * 4 + 2000 * 0.5 / 8 + 5 * 60  # H(0.1) = 0.47 bits
    assert parts["bits"].bytes < 9 * 33 / 2 + 60


def test_what_cannot_be_written():
    with pytest.raises(UsageError, match="no tensors of this type"):
        dumps({"z": torch.zeros(100, dtype=torch.complex64)}, {})


def test_every_flipped_bit_and_every_truncation_is_found():
    data = dumps({"a": torch.randn(3), "b": torch.zeros(2, 2)}, {"m": 1})
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match="corrupt"):
            loads(bytes(flipped)).tensors()
    for n in range(len(data)):
        with pytest.raises(InputError, match="corrupt"):
            loads(data[:n])
    with pytest.raises(InputError, match="stated"):
        loads(data + b"\0")


def rewritten(header: Any, sections: bytes) -> bytes:
    """A file with every checksum right, whatever the header says."""
    packed = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    head = PREFIX.pack(b"QKITCODE", 1, len(packed)) + packed
    return head + zlib.crc32(head).to_bytes(4, "little") + sections


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<8sHI", data[:14])[2]
    return json.loads(zlib.decompress(data[14 : 14 + size])), data[14 + size + 4 :]


GOOD = opened(dumps(examples(), {}, PACKED))
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 70),
    st.sampled_from(["bytes", "planes", "sparse", "bits-3-7", "fill-00", "fill-zz", "float32", ""]),
    st.lists(st.integers(-1, 1 << 40), max_size=3),
)


@settings(max_examples=200)
@given(st.data())
def test_a_hostile_header_is_an_input_error_or_harmless(data):
    header, sections = copy.deepcopy(GOOD)
    name = data.draw(st.sampled_from(list(header["tensors"])))
    place = data.draw(st.integers(-1, 3))
    if place < 0:
        header["tensors"][name] = data.draw(JUNK)
    else:
        header["tensors"][name][place] = data.draw(JUNK)
    try:
        loads(rewritten(header, sections)).tensors()
    except InputError:
        return


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"meta": {}}',
        b'{"meta": [], "tensors": {}}',
        b'{"meta": {}, "tensors": {"a": 1}}',
        b'{"meta": {}, "tensors": {}, "more": 1}',
        b"[" * 100_000,
    ],
)
def test_other_headers_are_refused(header):
    with pytest.raises(InputError):
        loads(rewritten(header, b""))


def entry(dtype: str, shape: list[int], coding: str, *sections: bytes) -> bytes:
    tensors_ = {"a": [dtype, shape, coding, [len(s) for s in sections]]}
    return rewritten({"meta": {}, "tensors": tensors_}, b"".join(sections))


SECTION = entropy.encode(np.array([0, 1, 2, 3], np.uint8))
SIGNED = entropy.encode(np.array([0, 1, 2, 3], np.int8))

WRONG = {
    "too few bytes": entry("uint8", [5], "bytes", SECTION),
    "too many bytes": entry("uint8", [3], "bytes", SECTION),
    "signed": entry("uint8", [4], "bytes", SIGNED),
    "planes missing": entry("float16", [4], "planes", SECTION),
    "mask of 3": entry("uint8", [4], "sparse", SECTION, SECTION),
    "codes too large": entry("int32", [1, 1], "bits-1-4", SECTION),
    "words of another width": entry("int32", [1, 2], "bits-2-4", SECTION),
    "words of another type": entry("int64", [1, 1], "bits-2-4", SECTION),
    "truth of 3": entry("bool", [4], "bytes", SECTION),
    "fill of many": entry("uint8", [MAX_FILL + 1], "fill-00"),
    "fill of another width": entry("float32", [1], "fill-00"),
    "fill with a section": entry("uint8", [1], "fill-00", SECTION),
    "beyond memory": entry("uint8", [1 << 62, 1 << 62], "bytes", SECTION),
    "hidden by zero": entry("uint8", [0, 1 << 62], "bytes", SECTION),
    "negative": entry("uint8", [-4], "bytes", SECTION),
}


@pytest.mark.parametrize("case", WRONG)
def test_entries_that_do_not_fit_their_sections(case):
    with pytest.raises(InputError):
        loads(WRONG[case]).tensors()


def test_a_stated_size_allocates_nothing():
    hostile = [
        entry("float64", [1 << 40], "bytes", SECTION),
        entry("float32", [1 << 45], "sparse", SECTION, *[SECTION] * 4),
        rewritten(b" " * (1 << 27), b""),  # a header that inflates to 128 MiB
    ]
    for data in hostile:
        tracemalloc.start()
        try:
            with pytest.raises(InputError):
                loads(data).tensors()
            # No more than the longest header that is read (64 MiB), which the last one nears.
            assert tracemalloc.get_traced_memory()[1] < 1 << 28
        finally:
            tracemalloc.stop()


def test_files(tmp_path):
    path = tmp_path / "x.qkit"
    path.write_bytes(dumps({"a": torch.ones(2)}, {}))
    assert is_container(path)
    assert isinstance(open_container(path), Container)
    assert not is_container(tmp_path)
    assert not is_container(tmp_path / "none")
    with pytest.raises(InputError, match="cannot read"):
        open_container(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"x\.qkit"):
        open_container(path)
    path.write_bytes(b"QKITCODE\2\0" + bytes(20))
    with pytest.raises(InputError, match="version 2"):
        open_container(path)
