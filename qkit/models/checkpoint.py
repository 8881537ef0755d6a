"""A checkpoint that need not fit in memory: its tensors on the meta device, their values on disk.

Names, shapes and dtypes come from the headers (safetensors) or from unpickling without values
(``torch.save``); the values of a tensor are read when they are asked for, at their place in the
file and into memory of ours. Nothing is mapped, so nothing stays resident.
"""

from __future__ import annotations

import json
import mmap
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkit.errors import InputError, RequestError
from qkit.models.folder import check_state_dict, merge, read_config, refuse_quanto
from qkit.models.load import as_state_dict, from_object
from qkit.models.loaded import Source
from qkit.models.pickles import MAX_EXPANDED_BYTES, read_pickle
from qkit.models.sniff import FOLDER, PICKLE, SAFETENSORS, sniff, weight_files

# Values in a block of rows, where nothing else is asked for: what the caches of a processor hold.
BLOCK = 1 << 20

# Bytes from which memory is taken from the system itself.
LARGE = 1 << 18

# The types of safetensors, in the order in which its library lays tensors out in a file.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor: ``meta`` has its shape, strides and dtype; its values start at ``offset``."""

    meta: Tensor
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return self.meta.numel() * self.meta.element_size()


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; ``checkpoint[name]`` reads one into new memory.

    ``files`` are the files that were opened, ``notes`` what was adjusted (see :class:`Source`).
    """

    entries: dict[str, Entry]
    kind: str = SAFETENSORS
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def metas(self) -> dict[str, Tensor]:
        """The state dict without values; tensors that share their memory are one object."""
        return {name: entry.meta for name, entry in self.entries.items()}

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Tensor:
        meta = self.entries[name].meta
        if meta.numel() == 0:
            return torch.empty(meta.shape, dtype=meta.dtype)
        return self._strided(name)

    def blocks(self, name: str, values: int, buffer: Tensor | None = None) -> Iterator[Any]:
        """``(start, rows)`` for consecutive rows of a tensor, about ``values`` values at a time.

        At least one row, and all at once of a tensor that is not contiguous. The rows lie in
        ``buffer`` (uint8), where one is given that is large enough: they are valid until the next.
        A tensor without dimensions is its only block.
        """
        meta = self.entries[name].meta
        if meta.numel() == 0:
            return
        if not meta.dim() or not meta.is_contiguous():
            yield 0, self._strided(name)
            return
        row = meta.numel() // meta.shape[0] * meta.element_size()
        for start, rows in row_blocks(meta, values):
            memory = self._read(name, start * row, rows * row, buffer)
            yield start, memory.view(meta.dtype).view(rows, *meta.shape[1:])

    def _strided(self, name: str) -> Tensor:
        meta = self.entries[name].meta
        memory = self._read(name, 0, span(meta), None)
        return memory.view(meta.dtype).as_strided(meta.shape, meta.stride())

    def _read(self, name: str, offset: int, count: int, buffer: Tensor | None) -> Tensor:
        """``count`` bytes of a tensor, as uint8."""
        entry = self.entries[name]
        fits = buffer is not None and buffer.numel() >= count
        memory = buffer[:count] if buffer is not None and fits else _memory(count)
        view, done = memory.numpy().data, 0
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.offset + offset)
                while done < count and (read := file.readinto(view[done:])):
                    done += read
        except OSError as error:
            raise InputError(
                f"cannot read the file: {error.strerror}", where=f"{entry.path}: {name}"
            ) from error
        if done < count:
            raise InputError("the file is truncated", where=f"{entry.path}: {name}")
        return memory


def _memory(count: int) -> Tensor:
    """``count`` bytes; if they are many, they go back to the system as soon as they are given up.

    Of malloc's, what lies between pieces in use stays with the process: with tensors of many sizes,
    several times the largest.
    """
    if count < LARGE:
        return torch.empty(count, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def row_blocks(tensor: Tensor, values: int) -> Iterator[tuple[int, int]]:
    """``(start, count)`` of consecutive rows of ``tensor``, about ``values`` values at a time."""
    step = max(1, values * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), step):
        yield start, min(step, len(tensor) - start)


def span(meta: Tensor) -> int:
    """The bytes between the first and behind the last value of a tensor."""
    last = sum((n - 1) * s for n, s in zip(meta.shape, meta.stride(), strict=True))
    return (last + 1) * meta.element_size() if meta.numel() else 0


def open_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """The tensors in a safetensors file, a ``torch.save`` file or a folder of shards of these.

    Raises :class:`~qkit.errors.InputError` for what cannot be read, for a shard that is missing or
    cut off and for an index that does not fit its shards; :class:`~qkit.errors.RequestError` for a
    file that holds more than tensors (a module, TorchScript, a program) or compressed ones.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == PICKLE:
        # Wherever a training loop put the state dict; the names are those without wrappers.
        loaded = from_object(_unpickle(path, trust), Source(str(path), kind, {}))
        if loaded.state_dict is None:
            raise _not_streamed(path, "a pickled module")
        entries = _places(loaded.state_dict, path)
        return Checkpoint(_tied(entries), kind, (path,), loaded.source.notes)
    if kind == SAFETENSORS:
        entries, files = _safetensors(path), [path]
    elif kind == FOLDER:
        refuse_quanto(path)
        read_config(path)  # refuses what is quantized already
        entries, config = open_folder(path, trust=trust).entries, path / "config.json"
        files = [*weight_files(path), *([config] if config.is_file() else [])]
    else:
        raise _not_streamed(path, f"a {kind} file")
    by_meta = {id(entry.meta): entry for entry in entries.values()}
    metas = {name: entry.meta for name, entry in entries.items()}
    loaded = as_state_dict(Source(str(path), kind, {}), metas)
    found = {name: by_meta[id(meta)] for name, meta in (loaded.state_dict or {}).items()}
    return Checkpoint(_tied(found), kind, tuple(files), loaded.source.notes)


def open_folder(folder: Path, *, trust: bool = False) -> Checkpoint:
    """The weights in ``folder`` under their own names, whatever else it holds (see ``merge``)."""

    def entries(path: Path) -> Mapping[str, Entry]:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return _places(check_state_dict(_unpickle(path, trust), path), path)

    return Checkpoint(merge(folder, entries))


def _not_streamed(path: Path, what: str) -> RequestError:
    return RequestError(
        "only files of plain tensors are streamed",
        where=str(path),
        got=what,
        wanted="safetensors, or a state dict that torch.save wrote",
        fix="quantize it without --stream",
    )


def _safetensors(path: Path) -> dict[str, Entry]:
    """The header of a safetensors file; the library checks it against the file's size."""
    try:
        with safe_open(path, framework="pt") as checked, path.open("rb") as file:
            order = list(checked.keys())
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"cannot read the safetensors file: {error}", where=str(path)) from error
    entries = {}
    for name in order:
        facts = header[name]
        if facts["dtype"] not in DTYPES:
            raise InputError("torch has no such type", where=f"{path}: {name}", got=facts["dtype"])
        meta = torch.empty(facts["shape"], dtype=DTYPES[facts["dtype"]], device="meta")
        entries[name] = Entry(meta, path, 8 + length + facts["data_offsets"][0])
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries of one name: {max(names, key=names.count)!r}")
    return found


def _unpickle(path: Path, trust: bool) -> Any:
    """What ``torch.save`` wrote, with its tensors on the meta device."""
    kind = sniff(path)
    if kind != PICKLE:
        raise _not_streamed(path, f"a {kind} file")
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise _not_streamed(path, "a compressed archive")
        orders = [n for n in archive.namelist() if n.partition("/")[2] == "byteorder"]
        if orders and archive.read(orders[0]).decode() != sys.byteorder:
            raise _not_streamed(path, "values in the byte order of another machine")
    return read_pickle(path, kind, trust=trust, device="meta")


def _places(state: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    """Where torch says that the values of unpickled tensors lie; checked, for a file may lie."""
    entries, size = {}, path.stat().st_size
    for name, meta in state.items():
        if not isinstance(meta, Tensor):
            continue
        where = f"{path}: {name}"
        if meta.layout != torch.strided or meta.is_quantized:
            raise InputError("not a plain tensor", where=where, got=str(meta.layout))
        storage = meta.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None and meta.numel():
            raise InputError("a tensor has no values: it was saved on the meta device", where=where)
        claimed, skipped = (
            meta.numel() * meta.element_size(),
            meta.storage_offset() * meta.element_size(),
        )
        if claimed > max(storage.nbytes(), MAX_EXPANDED_BYTES):
            raise InputError("a tensor claims more values than the file holds", where=where)
        offset = (start or 0) + skipped
        if skipped + span(meta) > storage.nbytes() or offset + span(meta) > size:
            raise InputError("a tensor lies outside the file", where=where)
        entries[name] = Entry(meta, path, int(offset))
    return entries


def _tied(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same with one object for tensors that are the same values in the file."""
    made: dict[tuple[Any, ...], Entry] = {}

    def one(entry: Entry) -> Entry:
        meta = entry.meta
        if meta.numel() == 0:
            return entry
        key = (entry.path, entry.offset, meta.shape, meta.stride(), meta.dtype)
        return made.setdefault(key, entry)

    return {name: one(entry) for name, entry in entries.items()}
