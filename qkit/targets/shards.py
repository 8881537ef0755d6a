"""Writing safetensors files whose values come piece by piece, in any order, by any thread.

The shapes are known ahead, so the files get their headers and their full size first (a disk that
is too small shows before the work) and every piece is written to its place. The files are those
that the safetensors library would write for the same tensors, byte for byte.

One shard is ``model.safetensors``; more are ``model-00001-of-000NN.safetensors`` with the index
``model.safetensors.index.json``, as transformers names them.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.models.checkpoint import DTYPES
from qkit.packing.store import Stored
from qkit.targets.artifact import INDEX, WEIGHTS

_NAMES = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}


def nbytes(stored: Stored) -> int:
    """The bytes of the values of a tensor."""
    return math.prod(stored.shape) * stored.dtype.itemsize


def assign(tensors: Mapping[str, Stored], limit: int | None) -> list[list[str]]:
    """Names by shard, in their order: each shard as full as ``limit`` bytes allow (None: one)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, stored in tensors.items():
        if limit is not None and shards[-1] and size + nbytes(stored) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(stored)
    return shards


class TensorFile:
    """The file of ``tensors`` at ``path``, whose values are written in pieces.

    ``again`` opens the file that an earlier run made for the same tensors, with what it has
    written; :class:`~qkit.errors.InputError` if the file is not that.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored], *, again: bool = False) -> None:
        self.path = path
        # The library's order: wide types first, so that every tensor is aligned.
        order = sorted(tensors, key=lambda name: (_NAMES[tensors[name].dtype][0], name.encode()))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in order:
            starts[name], end = end, end + nbytes(tensors[name])
            header[name] = {
                "dtype": _NAMES[tensors[name].dtype][1],
                "shape": list(tensors[name].shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(head) + start for name, start in starts.items()}
        if again:
            self._check(head, len(head) + end)
        else:
            self._create(head, len(head) + end)
        self._synced = False

    def _create(self, head: bytes, size: int) -> None:
        with self.path.open("wb") as file:
            file.write(head)
            file.flush()
            _allocate(file.fileno(), size)

    def _check(self, head: bytes, size: int) -> None:
        good = self.path.is_file() and self.path.stat().st_size == size
        if good:
            with self.path.open("rb") as file:
                good = file.read(len(head)) == head
        if not good:
            raise InputError(
                "what an earlier run has written is damaged",
                where=str(self.path),
                fix="start anew, without --resume",
            )

    def write(self, name: str, offset: int, values: Tensor) -> int:
        """Write ``values`` at byte ``offset`` of the tensor ``name``; return how many bytes."""
        data = values.detach().contiguous().flatten().view(torch.uint8).numpy()
        self._synced = False
        handle = os.open(self.path, os.O_WRONLY)
        try:
            view, place = data.data, self._starts[name] + offset
            while view:
                count = os.pwrite(handle, view, place)
                view, place = view[count:], place + count
        finally:
            os.close(handle)
        return len(data)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._synced:
            return
        self._synced = True  # a piece that is written meanwhile makes it false again
        handle = os.open(self.path, os.O_WRONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ShardWriter:
    """The files of ``tensors`` in ``folder``: :meth:`write` every byte, then :meth:`finish`.

    ``limit`` is the greatest size of a shard in bytes of values (a larger tensor is alone in
    its own). ``again`` goes on with the files of an earlier run: see :class:`TensorFile`.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Stored],
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> None:
        shards = assign(tensors, limit)
        many = len(shards) > 1
        self._missing = {name: nbytes(stored) for name, stored in tensors.items()}
        self._files: dict[str, TensorFile] = {}
        for number, names in enumerate(shards, 1):
            path = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS
            file = TensorFile(folder / path, {name: tensors[name] for name in names}, again=again)
            self._files |= dict.fromkeys(names, file)
        if many:
            index = {
                "metadata": {"total_size": sum(self._missing.values())},
                "weight_map": {name: file.path.name for name, file in self._files.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, offset: int, values: Tensor) -> None:
        """Write ``values`` at byte ``offset`` of the tensor ``name``."""
        self._missing[name] -= self._files[name].write(name, offset, values)

    def written(self, name: str) -> None:
        """An earlier run has written all of the tensor ``name``."""
        self._missing[name] = 0

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        for file in dict.fromkeys(self._files.values()):
            file.sync()

    def finish(self) -> None:
        """Every byte must have been written, once."""
        if left := [name for name, count in self._missing.items() if count]:
            raise AssertionError(f"not written as planned: {', '.join(left[:5])}")


def _allocate(handle: int, size: int) -> None:
    """Give a file its size, and the disk space for it where the system can promise that."""
    os.ftruncate(handle, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
