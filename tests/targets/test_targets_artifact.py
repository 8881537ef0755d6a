"""The artifact's table of contents: written with hashes, read with suspicion."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from qkit.errors import InputError
from qkit.spec import parse
from qkit.targets.artifact import (
    FORMAT_VERSION,
    META,
    REPORT,
    WEIGHTS,
    Artifact,
    LayerFacts,
    check_files,
    read_artifact,
    sha256,
    write_meta,
)

FILES = {WEIGHTS: b"\0weights" * 100, "check.safetensors": b"check", "config.json": b"{}"}
FACTS = {"layers": {"größe": {"shape": [3, 4]}}, "recipe": None}


@pytest.fixture
def folder(tmp_path):
    """Files, but no table of contents yet."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def test_round_trip(folder):
    written = write_meta(folder, FACTS)
    read = read_artifact(folder)
    assert read == written
    assert read.meta["layers"] == FACTS["layers"]
    assert read.meta["format_version"] == FORMAT_VERSION
    check_files(read)


def test_a_path_may_be_text(folder):
    write_meta(folder, FACTS)
    assert read_artifact(str(folder)).path == folder


def test_every_file_is_listed_with_size_and_hash(folder):
    files = write_meta(folder, FACTS).meta["files"]
    assert files == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in FILES.items()
    }
    assert list(files) == sorted(files)


def test_the_table_and_the_report_are_not_listed(folder):
    (folder / REPORT).write_text("{}")
    write_meta(folder, FACTS)
    files = write_meta(folder, FACTS).meta["files"]  # again: the table exists now
    assert files.keys() == FILES.keys()


def test_the_report_may_change(folder):
    artifact = write_meta(folder, FACTS)
    (folder / REPORT).write_text("later")
    check_files(artifact)


def test_equal_contents_give_equal_bytes(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in reversed(FILES):
        (other / name).write_bytes(FILES[name])
    write_meta(folder, FACTS)
    write_meta(other, dict(FACTS))
    assert (folder / META).read_bytes() == (other / META).read_bytes()
    assert str(tmp_path) not in (folder / META).read_text()


def test_size_bytes(folder):
    artifact = write_meta(folder, FACTS)
    sizes = artifact.size_bytes
    assert sizes.pop(META) == (folder / META).stat().st_size
    assert sizes == {name: len(data) for name, data in FILES.items()}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256(size, tmp_path):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# Refusals


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_a_changed_byte(name, at, folder):
    artifact = write_meta(folder, FACTS)
    data = bytearray(FILES[name])
    data[at] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="not the one that was written") as caught:
        check_files(artifact)
    assert caught.value.exit_code == 3
    assert name in str(caught.value)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_another_length(change, folder):
    artifact = write_meta(folder, FACTS)
    (folder / WEIGHTS).write_bytes(change(FILES[WEIGHTS]))
    with pytest.raises(InputError, match="not the one that was written"):
        check_files(artifact)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name, folder):
    artifact = write_meta(folder, FACTS)
    (folder / name).unlink()
    with pytest.raises(InputError, match="missing") as caught:
        check_files(artifact)
    assert name in str(caught.value)


def test_a_folder_in_the_place_of_a_file(folder):
    artifact = write_meta(folder, FACTS)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(InputError, match="missing"):
        check_files(artifact)


def test_an_extra_file_does_no_harm(folder):
    artifact = write_meta(folder, FACTS)
    (folder / "README.md").write_text("mine")
    check_files(artifact)


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "table is a folder"])
def test_not_an_artifact(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("{}")
    elif kind != "missing":
        (path / META if kind == "table is a folder" else path).mkdir(parents=True)
    with pytest.raises(InputError, match="not a qkit artifact") as caught:
        read_artifact(path)
    assert caught.value.exit_code == 3
    assert META in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"format_version": 1', b"\xff\xfe", b"\0" * 10, b'{"format_version": 1} x'],
    ids=["empty", "open", "cut", "not-text", "zeros", "trailing"],
)
def test_corrupt_json(data, folder):
    (folder / META).write_bytes(data)
    with pytest.raises(InputError, match="corrupt"):
        read_artifact(folder)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"format_version": 2},
        {"format_version": "1"},
        {"format_version": None},
        [],
        "1",
        None,
        1,
    ],
    ids=str,
)
def test_an_unknown_version(meta, folder):
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="version") as caught:
        read_artifact(folder)
    assert str(FORMAT_VERSION) in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [None, [], {WEIGHTS: None}, {WEIGHTS: {}}, {WEIGHTS: {"bytes": 800}}],
    ids=["absent", "list", "nothing", "empty", "no-hash"],
)
def test_a_malformed_list_of_files(files, folder):
    meta = {"format_version": FORMAT_VERSION} | ({} if files is None else {"files": files})
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="corrupt"):
        check_files(read_artifact(folder))


def turned(**changes: object) -> LayerFacts:
    """The facts of a transposed convolution ``[6, 2, 3]`` in 3 groups, as they are read."""
    facts = {
        "class": "QConvTranspose1d",
        "shape": [6, 2, 3],
        "dtype": "float32",
        "spec": parse("w8a16").weight.to_json(),
        "input": None,
        "turned": 3,
    }
    return Artifact(Path("."), {"layers": {"up": facts | changes}}).layers["up"]


def test_a_turned_weight():
    facts = turned()
    assert facts.float_shape == (6, 2, 3)
    assert turned(turned=1).float_shape == (2, 6, 3)
    assert turned(turned=6).float_shape == (12, 1, 3)
    rows = torch.arange(36.0).reshape(6, 6)
    for groups in (1, 2, 3, 6):
        facts = turned(turned=groups)
        weight = facts.as_weight(rows)
        assert weight.shape == facts.float_shape
        for out, i in itertools.product(range(6), range(2)):
            per = 6 // groups
            want = rows[out].reshape(2, 3)[i]
            assert torch.equal(weight[out // per * 2 + i, out % per], want)


@pytest.mark.parametrize("groups", [0, -1, 4, 7, True, 1.0, "1", None])
def test_groups_that_cannot_be(groups):
    with pytest.raises(InputError, match="layers"):
        turned(turned=groups)
