"""Shards that are written piece by piece are the files that the safetensors library writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qkit.models.checkpoint import DTYPES
from qkit.packing.store import Stored
from qkit.targets.shards import ShardWriter, assign

SIZES = st.sampled_from([0, 1, 3, 7, 31, 33])


def stored(tensors: dict[str, Tensor]) -> dict[str, Stored]:
    return {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(writer: ShardWriter, tensors: dict[str, Tensor], piece: int) -> None:
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8)
        for start in reversed(range(0, len(data), piece)):  # in any order
            writer.write(name, start, data[start : start + piece])


@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(list(DTYPES.values())), min_size=6, max_size=6),
    piece=st.integers(1, 500),
)
def test_one_shard_is_the_file_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        f'{"zaéß"[i % 4]}"\\{i}.重': torch.randint(0, 2, shape).to(dtypes[i])
        for i, shape in enumerate(shapes)
    }
    writer = ShardWriter(folder, stored(tensors))
    write(writer, tensors, piece)
    writer.finish()
    save_file(tensors, folder / "want", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "want").read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate((10, 10, 31, 1, 0, 7))}
    assert assign(stored(tensors), 80) == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]
    assert assign(stored(tensors), None) == [list(tensors)]
    writer = ShardWriter(tmp_path, stored(tensors), 80)
    write(writer, tensors, 13)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 59 * 4
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    from qkit.models.folder import read_tensors

    read = read_tensors(tmp_path, trust=False)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_what_was_not_written_is_noticed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"x": Stored((3,), torch.float32)})
    writer.write("x", 0, torch.ones(2))
    with pytest.raises(AssertionError, match="x"):
        writer.finish()


def test_a_disk_that_is_too_small_shows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"."):
        ShardWriter(tmp_path, {"x": Stored((1 << 30, 1 << 24), torch.float64)})  # 2^57 bytes
