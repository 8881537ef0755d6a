"""Streaming damaged checkpoints, and to disks that are full or read-only: nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import disk, files, names, qkit
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("same_process")
FIRST, LAST = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "big"
    folder.mkdir()
    parts = {
        FIRST: {"a.weight": torch.randn(31, 33), "größe.weight": torch.randn(7, 33).bfloat16()},
        LAST: {"b.weight": torch.randn(33, 7).half(), "none.weight": torch.empty(0, 3)},
    }
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    named = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    return folder


def damage(folder: Path, kind: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    if kind == "missing":
        (folder / LAST).unlink()
    elif kind == "truncated":
        (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1])
    elif kind == "header":
        (folder / LAST).write_bytes((folder / LAST).read_bytes()[:20])
    elif kind == "double":
        save_file(load_file(folder / LAST) | {"a.weight": torch.ones(3, 3)}, folder / LAST)
    elif kind == "absent":
        index["weight_map"]["c.weight"] = FIRST
    elif kind == "outside":
        index["weight_map"]["b.weight"] = "../other.safetensors"
    elif kind == "index":
        index = {"weight_map": 3}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "a shard is missing"),
        ("truncated", "cannot read the safetensors file"),
        ("header", "cannot read the safetensors file"),
        ("double", "a tensor stands in two shards"),
        ("absent", "the index names a tensor that is not in its shard"),
        ("outside", "a shard lies outside the folder"),
        ("index", "the index of the shards is corrupt"),
    ],
)
def test_a_damaged_folder(kind: str, text: str, shards: Path, tmp_path: Path, main) -> None:
    damage(shards, kind)
    for options in ([], ["--stream"], ["--resume"]):
        done = main("quantize", shards, "-o", tmp_path / "out", *options)
        assert done.code == 3
        assert text in done.error
        assert str(shards) in done.error
    assert names(tmp_path) == ["big"]


def test_names_types_and_empty_tensors(shards: Path, tmp_path: Path, main) -> None:
    done = main("quantize", shards, "-o", tmp_path / "out", "--shard-size", "500B", "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row["scheme"] for row in done.json["layers"]}
    assert rows == {"a": "w8a16", "größe": "w8a16", "b": "w8a16", "none": None}
    stored = {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(path)
    assert stored["größe.weight"].dtype == torch.int8
    assert stored["none.weight"].shape == (0, 3)


def test_a_truncated_pickle(tmp_path: Path, main) -> None:
    torch.save({"a.weight": torch.randn(31, 33)}, path := tmp_path / "m.pt")
    path.write_bytes(path.read_bytes()[:-100])
    done = main("quantize", path, "-o", tmp_path / "out", "--stream")
    assert (done.code, "truncated or corrupt" in done.error) == (3, True)
    assert names(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("options", [[], ["--shard-size", "200kB"]], ids=["one", "shards"])
def test_a_full_disk_is_told_before_the_work(options, tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    save_file({f"{i}.weight": torch.randn(256, 256) for i in range(4)}, source)
    (tmp_path / "disk").mkdir()
    with disk(tmp_path / "disk", "size=128k") as full:
        done = qkit("quantize", source, "-o", full / "out", *options)
        assert done.code == 1
        assert f"No space left on device (in: {full}/out)" in done.error
        assert "verifying" not in done.err
        assert names(full) == []


def test_a_full_disk_keeps_the_old_artifact(shards: Path, tmp_path: Path, main) -> None:
    assert main("quantize", shards, "-q", "-o", tmp_path / "old").code == 0
    source = tmp_path / "m.safetensors"
    save_file({"w.weight": torch.randn(1024, 1024)}, source)
    (tmp_path / "disk").mkdir()
    with disk(tmp_path / "disk", "size=200k") as full:
        shutil.copytree(tmp_path / "old", full / "out")
        before = files(full / "out")
        done = main("quantize", source, "-o", full / "out", "--overwrite", "--stream")
        assert (done.code, "No space left" in done.error) == (1, True)
        assert names(full) == ["out"]
        assert files(full / "out") == before


def test_a_read_only_disk(shards: Path, tmp_path: Path, main) -> None:
    (tmp_path / "disk").mkdir()
    with disk(tmp_path / "disk", "ro") as folder:
        for options in ([], ["--resume"]):
            done = main("quantize", shards, "-o", folder / "out", "--stream", *options)
            assert (done.code, "read-only" in done.error) == (1, True)
        assert names(folder) == []
