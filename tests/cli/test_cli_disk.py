"""Disks that are full or read-only, and what lies at the output already."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
from command import disk, files, names, python, qkit


@pytest.mark.parametrize("size", ["16k", "48k"], ids=["weights", "later"])
def test_a_full_disk(size, models, tmp_path):
    with disk(tmp_path, f"size={size}") as full:
        (full / "mine").write_text("mine")
        # The weights of the first model do not fit; of the second, the program does not.
        name = "large.pt" if size == "16k" else "net.pt"
        done = qkit("quantize", models / name, "-q", "-o", full / "out")
        assert done.code == 1
        assert done.err.count("\n") == 1
        assert "No space left" in done.error
        assert str(full / "out") in done.error
        assert names(full) == ["mine"]


def test_a_full_disk_keeps_the_old_artifact(models, artifact, tmp_path):
    with disk(tmp_path, "size=100k") as full:
        shutil.copytree(artifact, full / "out")
        before = files(full / "out")
        done = qkit("quantize", models / "large.pt", "-q", "-o", full / "out", "--overwrite")
        assert done.code == 1
        assert "No space left" in done.error
        assert names(full) == ["out"]
        assert files(full / "out") == before


@pytest.mark.parametrize("limit", [1_000, 12_000], ids=["weights", "program"])
def test_a_limit_on_the_size_of_files(limit, models, tmp_path):
    done = qkit(
        "quantize", models / "net.pt", "-q", "-o", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "too large" in done.error
    assert names(tmp_path) == []


def test_a_full_disk_leaves_no_part_of_the_demos_files(monkeypatch, main, tmp_path):
    from qkit.flows import demo

    monkeypatch.setattr(demo, "train", lambda model, data, seed: None)
    with disk(tmp_path, "size=100k") as full:  # the model has 750 kB
        done = main("demo", "-q", "-o", full / "out")
        assert done.code == 1
        assert done.error == f"cannot write the output: No space left on device (in: {full}/out)"
        assert names(full / "out") == []


def test_a_demo_where_a_file_lies(main, tmp_path):
    (tmp_path / "out").write_text("mine")
    done = main("demo", "-q", "-o", tmp_path / "out")
    assert done.code == 1
    assert "cannot write the output" in done.error
    assert (tmp_path / "out").read_text() == "mine"


def test_a_read_only_disk(models, tmp_path):
    with disk(tmp_path, "ro") as folder:
        done = qkit("quantize", models / "net.pt", "-q", "-o", folder / "out")
        assert done.code == 1
        assert done.err.count("\n") == 1
        assert "read-only" in done.error
        assert names(folder) == []


# Imports first: another user may not be able to read where this Python lies.
AS_NOBODY = """
import os, qkit.cli.quantize, qkit.cli.table, qkit.flows
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
qkit.cli.run()
"""


def test_a_folder_of_somebody_else(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(0o755)
        if folder.name.startswith("pytest-of-"):
            break
    done = python("-c", AS_NOBODY, "quantize", "net.pt", "-q", "-o", str(tmp_path / "out"))
    assert done.code == 1
    assert "read-only" in done.error
    assert names(tmp_path) == []


def test_a_place_where_nothing_can_be_made(models, main):
    done = main("quantize", models / "state.pt", "-q", "-o", "/proc/nowhere/out")
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert done.code == 1
    assert "cannot write the output" in done.error


# What lies there already


def test_an_existing_output_is_kept(models, artifact, main):
    before = files(artifact)
    done = main("quantize", models / "net.pt", "-q", "-o", artifact)
    assert done.code == 2
    assert "--overwrite" in done.error
    assert files(artifact) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_an_artifact_is_never_replaced(kind, options, models, artifact, main, tmp_path):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "notes").write_text("mine")
    else:
        out.symlink_to(artifact)
    before = files(tmp_path)
    done = main("quantize", models / "net.pt", "-q", "-o", out, *options)
    assert done.code == 2
    assert "left alone" in done.error
    assert files(tmp_path) == before
    assert out.is_symlink() == (kind == "link")


def test_overwrite_replaces_everything(models, artifact, main, tmp_path, same_process):
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    (out / "more").write_text("mine")
    done = main("quantize", models / "state.pt", "-q", "-o", out, "--overwrite")
    assert (done.code, done.err) == (0, "")
    assert names(out) == ["check.safetensors", "model.safetensors", "qkit.json", "report.json"]
    assert names(tmp_path) == ["out"]
    again = main("verify", out)
    assert "layers" in again.out
