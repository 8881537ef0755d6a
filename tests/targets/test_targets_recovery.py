"""What killed runs leave beside an output is put in order; a second Ctrl-C changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qkit.errors import UsageError
from qkit.targets import staging
from qkit.targets.staging import MARKER, check_destination, staged


def artifact(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / MARKER).write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_what_was_being_replaced_comes_back_and_counts_as_existing(out, dead):
    artifact(out.parent / f".model.old-{dead}", "old")
    artifact(out.parent / f".model.partial-{dead}", "new")
    with pytest.raises(UsageError, match="the output exists"):
        check_destination(out, overwrite=False)
    assert (out / MARKER).read_text() == "old"
    with staged(out, overwrite=True) as folder:
        (folder / MARKER).write_text("newer")
    assert (out / MARKER).read_text() == "newer"
    assert names(out.parent) == ["model"]


def test_what_was_replaced_is_removed_once_the_new_one_is_there(out, dead):
    artifact(out, "new")
    artifact(out.parent / f".model.old-{dead}", "old")
    check_destination(out, overwrite=True)
    assert (out / MARKER).read_text() == "new"
    with staged(out, overwrite=True) as folder:
        (folder / MARKER).write_text("newer")
    assert names(out.parent) == ["model"]


def test_what_a_live_run_is_replacing_is_not_touched(out):
    other = artifact(out.parent / f".model.old-{os.getppid()}", "old")
    check_destination(out, overwrite=False)
    with staged(out) as folder:
        (folder / MARKER).write_text("new")
    assert (other / MARKER).read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_took_the_place_meanwhile_is_kept(kind, out, dead):
    old = artifact(out.parent / f".model.old-{dead}", "old")
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "notes").write_text("mine")
    else:
        out.symlink_to(out.parent / "nowhere")
    with pytest.raises(UsageError, match="left alone"):
        check_destination(out, overwrite=True)
    assert (old / MARKER).read_text() == "old"


@pytest.mark.parametrize("name", [".model.old-x", ".model.old-", ".other.old-{}", "model.old-{}"])
def test_names_that_are_not_ours(name, out, dead):
    other = artifact(out.parent / name.format(dead), "mine")
    with staged(out) as folder:
        (folder / MARKER).write_text("new")
    assert (other / MARKER).read_text() == "mine"


# Parents


def fail(out: Path, meanwhile: Path | None = None) -> None:
    with pytest.raises(ZeroDivisionError), staged(out):  # noqa: PT012
        if meanwhile:
            meanwhile.write_text("mine")
        raise ZeroDivisionError


def test_parents_that_were_made_for_a_run_that_fails_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    fail(tmp_path / "a" / "b" / "c" / "model")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []


def test_parents_that_somebody_uses_are_kept(tmp_path):
    fail(tmp_path / "b" / "c" / "model", tmp_path / "b" / "notes")
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["notes"]


# Two at once


def test_two_runs_of_one_process_do_not_share_a_folder(out):
    with pytest.raises(UsageError, match="exists"), staged(out) as first:  # noqa: PT012
        with staged(out) as second:
            assert first != second
            (second / MARKER).write_text("second")
            (first / MARKER).write_text("first")
        assert (out / MARKER).read_text() == "second"
        assert (first / MARKER).read_text() == "first"
    assert (out / MARKER).read_text() == "second"
    assert names(out.parent) == ["model"]


def test_another_thread_may_write(out):
    """Where signals cannot be handled."""

    def write() -> None:
        with staged(out) as folder:
            (folder / MARKER).write_text("new")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (out / MARKER).read_text() == "new"


# Ctrl-C at bad moments


def test_a_second_ctrl_c_does_not_stop_the_cleaning(out, monkeypatch):
    rmtree = shutil.rmtree

    def interrupted(path, **options):
        signal.raise_signal(signal.SIGINT)
        rmtree(path, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:  # noqa: PT012
        (folder / MARKER).write_text("new")
        raise KeyboardInterrupt
    assert names(out.parent) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_between_the_renames_waits(at, out, monkeypatch):
    artifact(out, "old")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as folder:
        (folder / MARKER).write_text("new")
    assert (out / MARKER).read_text() == "new"
    assert names(out.parent) == ["model"]
