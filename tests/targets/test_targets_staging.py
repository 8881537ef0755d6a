"""Outputs appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qkit.errors import OutputError, QkitError, UsageError
from qkit.targets import staging
from qkit.targets.staging import MARKER, check_destination, staged


def write(folder: Path, text: str = "new") -> None:
    """Something that looks like an artifact."""
    (folder / MARKER).write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(b"x" * 100)


def artifact(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    write(path, text)
    return path


def names(folder: Path) -> list[str]:
    """Everything in ``folder``, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def out(tmp_path) -> Path:
    """A destination that does not exist, alone in its folder."""
    return tmp_path / "model"


# Success


def test_the_output_is_renamed_into_place(out):
    with staged(out) as folder:
        assert folder.parent == out.parent  # a rename, not a copy
        assert folder.name.startswith(".")
        write(folder)
        assert not out.exists()
    assert names(out) == [MARKER, "sub"]
    assert (out / "sub" / "data").read_bytes() == b"x" * 100
    assert names(out.parent) == ["model"]


def test_missing_parents_are_created(tmp_path):
    out = tmp_path / "a" / "b" / "model"
    with staged(out) as folder:
        write(folder)
    assert (out / MARKER).read_text() == "new"
    assert names(out.parent) == ["model"]


def test_a_relative_destination_is_fixed_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged(Path("model")) as folder:
        write(folder)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "model"]
    assert names(tmp_path / "elsewhere") == []


def test_an_empty_folder_may_be_the_destination(out):
    out.mkdir()
    with staged(out) as folder:
        write(folder)
    assert (out / MARKER).read_text() == "new"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize(
    "name", ["with space", "größe", "model[1]", "*", ".hidden", "-o", "a" * 200]
)
def test_any_name(name, tmp_path):
    stale = tmp_path / f".{name}.partial-{dead_pid()}"
    stale.mkdir()
    with staged(tmp_path / name) as folder:
        write(folder)
    assert names(tmp_path) == [name]


def test_permissions_are_those_of_a_normal_folder(out):
    other = out.parent / "other"
    other.mkdir()
    with staged(out) as folder:
        write(folder)
    assert out.stat().st_mode == other.stat().st_mode


# Errors inside the block


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError, UsageError]
)
def test_an_error_leaves_nothing(error, out):
    def run() -> None:
        with staged(out) as folder:
            write(folder)
            raise error("stop")

    with pytest.raises(error):
        run()
    assert names(out.parent) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_failing_write_is_an_output_error(code, out):
    with pytest.raises(OutputError, match=os.strerror(code)) as caught, staged(out):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 1
    assert str(out) in str(caught.value)
    assert names(out.parent) == []


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_a_failing_system_call_is_an_output_error(call, out, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"), monkeypatch.context() as patch:  # noqa: PT012
        if call == "mkdir":
            patch.setattr(Path, "mkdir", fail)
        with staged(out) as folder:
            (folder / MARKER).write_text("new")
            patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), fail)
    assert names(out.parent) == []


# What exists already


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize(
    "kind", ["file", "folder", "nested", "marker is a folder", "dangling link"]
)
def test_what_is_not_ours_is_left_alone(kind, overwrite, out):
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(out.parent / "nowhere")
    else:
        inside = {"folder": "notes", "nested": "a/notes", "marker is a folder": f"{MARKER}/notes"}[
            kind
        ]
        (out / inside).parent.mkdir(parents=True)
        (out / inside).write_text("mine")
    before = sorted(out.parent.rglob("*"))
    with (
        pytest.raises(UsageError, match="not a qkit artifact") as caught,
        staged(out, overwrite=overwrite),
    ):
        pytest.fail("the block must not run")
    assert caught.value.exit_code == 2
    assert sorted(out.parent.rglob("*")) == before
    assert out.is_symlink() or kind != "dangling link"


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("target", ["artifact", "empty"])
def test_a_link_is_not_replaced(target, overwrite, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "model"
    artifact(folder) if target == "artifact" else folder.mkdir()
    before = names(folder)
    out.symlink_to(folder)
    with pytest.raises(UsageError), staged(out, overwrite=overwrite):
        pytest.fail("the block must not run")
    assert out.is_symlink()
    assert names(folder) == before
    assert names(tmp_path) == ["folder", "model"]


def test_a_link_among_the_parents_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link" / "model") as folder:
        write(folder)
    assert (tmp_path / "real" / "model" / MARKER).is_file()


def test_an_artifact_needs_overwrite(out):
    artifact(out)
    with pytest.raises(UsageError, match="exists") as caught, staged(out):
        pytest.fail("the block must not run")
    assert "--overwrite" in str(caught.value)
    assert (out / MARKER).read_text() == "old"
    assert names(out.parent) == ["model"]


def test_an_artifact_is_replaced_with_overwrite(out):
    artifact(out)
    (out / "stale file").write_text("old")
    with staged(out, overwrite=True) as folder:
        write(folder)
        assert (out / MARKER).read_text() == "old"  # until the end
    assert names(out) == [MARKER, "sub"]
    assert (out / MARKER).read_text() == "new"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_the_old_artifact_survives_an_error(error, out):
    artifact(out)

    def run() -> None:
        with staged(out, overwrite=True) as folder:
            write(folder)
            raise error("stop")

    with pytest.raises(OutputError if error is OSError else error):
        run()
    assert (out / MARKER).read_text() == "old"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_artifact_survives_a_failing_rename(failing, out, monkeypatch):
    artifact(out)
    calls, rename = [], Path.rename

    def sometimes(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(OutputError, match="Input/output"), staged(out, overwrite=True) as folder:
        write(folder)
    assert (out / MARKER).read_text() == "old"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
def test_what_appears_meanwhile_is_left_alone(overwrite, out):
    with pytest.raises(UsageError), staged(out, overwrite=overwrite) as folder:  # noqa: PT012
        write(folder)
        out.mkdir()
        (out / "notes").write_text("mine")
    assert (out / "notes").read_text() == "mine"
    assert names(out.parent) == ["model"]


def test_two_runs_at_once_do_not_remove_each_others_work(out):
    with staged(out) as first:
        write(first)
        with pytest.raises(QkitError), staged(out) as second:  # noqa: PT012
            (second / MARKER).write_text("second")
            raise OutputError("stop")
        assert names(first) == [MARKER, "sub"]
    assert (out / MARKER).read_text() == "new"


# Destinations that cannot be written


@pytest.mark.parametrize("inside", ["model", "a/model"])
def test_a_file_among_the_parents(inside, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / inside
    with pytest.raises(OutputError, match="not a folder") as caught:
        check_destination(out, overwrite=False)
    assert caught.value.exit_code == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_parent(out, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="read-only"), staged(out):
        pytest.fail("the block must not run")
    assert names(out.parent) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_really_read_only_parent(out):
    out.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="read-only"):
            check_destination(out, overwrite=False)
    finally:
        out.parent.chmod(0o700)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OutputError), staged(tmp_path / ("a" * 300)):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_checking_changes_nothing(tmp_path):
    check_destination(tmp_path / "a" / "model", overwrite=False)
    check_destination(artifact(tmp_path / "old"), overwrite=True)
    assert names(tmp_path) == ["old"]


# Runs that were killed


def test_what_dead_runs_left_is_removed(out):
    stale = out.parent / f".{out.name}.partial-{dead_pid()}"
    artifact(stale)
    with staged(out) as folder:
        assert not stale.exists()
        write(folder)
    assert names(out.parent) == ["model"]


def test_what_live_runs_write_is_kept(out):
    live = artifact(out.parent / f".{out.name}.partial-{os.getppid()}")
    with staged(out) as folder:
        write(folder)
    assert names(live) == [MARKER, "sub"]


def test_processes_of_other_users_are_alive(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert staging._alive(1)


@pytest.mark.parametrize(
    "name", [".other.partial-{}", ".model.partial-x", "model.partial-{}", ".model"]
)
def test_other_files_are_not_taken_for_stale(name, out):
    other = artifact(out.parent / name.format(dead_pid()))
    with staged(out) as folder:
        write(folder)
    assert names(other) == [MARKER, "sub"]


def test_a_dead_run_with_our_own_process_number(out):
    """In a container every run may have the same one."""
    stale = artifact(out.parent / f".{out.name}.partial-{os.getpid()}")
    (stale / "half").write_text("written")
    with staged(out) as folder:
        assert names(folder) == []
        write(folder)
    assert names(out) == [MARKER, "sub"]


KILLED_WHILE_WRITING = """
import os, sys, signal
from pathlib import Path
from qkit.targets.staging import staged
with staged(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_WHILE_REPLACING = """
import os, sys, signal
from pathlib import Path
from qkit.targets.staging import staged
rename = Path.rename
def once(self, target):
    if Path(target) == Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = once
with staged(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "qkit.json").write_text("new")
"""


def killed(code: str, out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "overwrite"])
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(old, out):
    if old:
        artifact(out)
    killed(KILLED_WHILE_WRITING, out)
    assert out.exists() == old
    assert not old or (out / MARKER).read_text() == "old"
    assert len(names(out.parent)) == 1 + old
    with staged(out, overwrite=True) as folder:
        write(folder)
    assert names(out.parent) == ["model"]


def test_a_run_killed_between_the_renames_loses_nothing(out):
    artifact(out)
    killed(KILLED_WHILE_REPLACING, out)
    texts = {path.read_text() for path in out.parent.rglob(MARKER)}
    assert texts == {"old", "new"}
    with staged(out, overwrite=True) as folder:
        write(folder, "newer")
    assert (out / MARKER).read_text() == "newer"
    assert names(out.parent) == ["model"]


def test_a_run_killed_between_the_renames_is_undone_by_the_next_one(out):
    """Even if that one fails in turn."""
    artifact(out)
    killed(KILLED_WHILE_REPLACING, out)

    def fail() -> None:
        with staged(out, overwrite=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (out / MARKER).read_text() == "old"
    assert names(out.parent) == ["model"]


# A full disk


@contextmanager
def small_disk(at: Path):
    """A file system of 256 KiB, or a visible skip."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(at)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


WRITERS = {
    "bytes": lambda path: path.write_bytes(b"x" * (1 << 20)),
    "safetensors": lambda path: save_file({"x": torch.zeros(1 << 18)}, path),
}


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(writer, old, tmp_path):
    with small_disk(tmp_path) as disk:
        out = disk / "model"
        if old:
            artifact(out)
        with (
            pytest.raises(OutputError, match=r"(?i)space") as caught,
            staged(out, overwrite=True) as folder,
        ):
            WRITERS[writer](folder / "model.safetensors")
        assert caught.value.exit_code == 1
        assert names(disk) == (["model"] if old else [])
        assert not old or (out / MARKER).read_text() == "old"
