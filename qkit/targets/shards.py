"""Writing safetensors files whose values come piece by piece, in any order.

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
from typing import BinaryIO

import torch
from torch import Tensor

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


class ShardWriter:
    """The files of ``tensors`` in ``folder``: :meth:`write` every byte, then :meth:`finish`.

    ``limit`` is the greatest size of a shard in bytes of values (a larger tensor is alone in
    its own).
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Stored], limit: int | None = None
    ) -> None:
        shards = assign(tensors, limit)
        many = len(shards) > 1
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = {name: nbytes(stored) for name, stored in tensors.items()}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS
            self._create(folder / file, {name: tensors[name] for name in names})
        if many:
            index = {
                "metadata": {"total_size": sum(self._missing.values())},
                "weight_map": {name: path.name for name, (path, _) in self._places.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _create(self, path: Path, tensors: Mapping[str, Stored]) -> None:
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
        base = 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _allocate(file, base + end)
        self._places |= {name: (path, base + start) for name, start in starts.items()}

    def write(self, name: str, offset: int, values: Tensor) -> None:
        """Write ``values`` (contiguous) at byte ``offset`` of the tensor ``name``."""
        path, start = self._places[name]
        data = values.detach().contiguous().flatten().view(torch.uint8).numpy()
        with path.open("r+b", buffering=0) as file:
            file.seek(start + offset)
            view = data.data
            while view:
                view = view[file.write(view) :]
        self._missing[name] -= len(data)

    def finish(self) -> None:
        """Every byte must have been written, once."""
        if left := [name for name, count in self._missing.items() if count]:
            raise AssertionError(f"not written as planned: {', '.join(left[:5])}")


def _allocate(file: BinaryIO, size: int) -> None:
    """Give ``file`` its size, and the disk space for it where the system can promise that."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
