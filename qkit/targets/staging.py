"""Outputs appear whole or not at all: write beside the destination, sync, rename.

A run that is killed leaves hidden folders beside its output, which the next run for the same
output puts in order:

``.NAME.partial-PID``   what was being written: removed, or gone on with (:func:`left_behind`)
``.NAME.old-PID``       the artifact that ``--overwrite`` was replacing: brought back if ``NAME`` is
                        missing (the kill came between the two renames), else removed
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from qkit.errors import OutputError, UsageError

# The files that make a folder one of ours: an artifact, a benchmark. Only such a folder is ever
# replaced.
MARKER, BENCH = "qkit.json", "bench.json"

# What this process is writing now: a folder with our own process number that is not listed here
# was left by a dead run (in a container every run may have the same number).
_active: set[Path] = set()


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Refuse a destination that cannot be written, before any work is paid for.

    What a killed run was replacing is brought back first, so that it counts as existing.

    Raises :class:`~qkit.errors.UsageError` if it exists (and is not an artifact to overwrite),
    :class:`~qkit.errors.OutputError` if its parent folder cannot be written.
    """
    with as_output_error(out):
        _restore(out.absolute())
        if os.path.lexists(out) and not _is_empty(out):
            if not _is_ours(out):
                raise UsageError(
                    "the output exists and is not a qkit artifact; it is left alone",
                    where=str(out),
                    fix="choose another --output",
                )
            if not overwrite:
                raise UsageError(
                    "the output exists", where=str(out), fix="--overwrite, or another --output"
                )
        _check_parent(out)


def _check_parent(out: Path) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError("the output's parent is not a folder", where=str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            "the output folder is read-only", where=str(parent), fix="another --output"
        )


def _starts_with(out: Path, magic: bytes) -> bool:
    if not out.is_file():
        return False
    with out.open("rb") as file:
        return file.read(len(magic)) == magic


def _is_ours(out: Path) -> bool:
    if not out.is_dir() or out.is_symlink():
        return False
    return any((out / name).is_file() for name in (MARKER, BENCH))


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


@contextmanager
def as_output_error(out: Path) -> Iterator[None]:
    """What fails to be written inside the block is an :class:`~qkit.errors.OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write the output: {reason}", where=str(out)) from error


def check_file_destination(out: Path, magic: bytes, *, overwrite: bool) -> None:
    """:func:`check_destination` for an output that is one file, which starts with ``magic``."""
    with as_output_error(out):
        if os.path.lexists(out):
            if not _starts_with(out, magic):
                raise UsageError(
                    "the output exists and is another kind of file; it is left alone",
                    where=str(out),
                    fix="choose another --output",
                )
            if not overwrite:
                raise UsageError(
                    "the output exists", where=str(out), fix="--overwrite, or another --output"
                )
        _check_parent(out)


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """The path of a file to write; it becomes ``out`` when the block ends without an error."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged(out: Path, *, overwrite: bool = False, resumed: Path | None = None) -> Iterator[Path]:
    """A fresh folder to write in; it becomes ``out`` when the block ends without an error.

    ``resumed``, one of :func:`left_behind`, is gone on with instead. After an error or an
    interrupt there is nothing new on disk.
    """
    check_destination(out, overwrite=overwrite)
    out = out.absolute()
    with as_output_error(out), parents(out), _folder(out, resumed) as staging:
        yield staging
        for path in sorted(staging.rglob("*")):
            _sync(path)
        _sync(staging)
        # Again: something may have appeared there meanwhile.
        check_destination(out, overwrite=overwrite)
        with _undisturbed():
            _replace(staging, out)


def write_whole(path: Path, content: bytes) -> None:
    """One file of its own: whole, or as it was before. Raises OSError if it cannot be written."""
    with staged_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def parents(out: Path) -> Iterator[None]:
    """The missing parents of ``out`` are made for the block, and removed if it fails."""
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            try:
                parent.rmdir()
            except OSError:  # somebody else has written there
                break
        raise


@contextmanager
def _folder(out: Path, resumed: Path | None) -> Iterator[Path]:
    _remove_stale(out, resumed)
    first = f".{out.name}.partial-{os.getpid()}"
    names = [first, *(f"{first}.{n}" for n in range(1, len(_active) + 1))]
    staging = next(path for name in names if (path := out.parent / name) not in _active)
    _active.add(staging)
    try:
        if resumed is None:
            staging.mkdir()
        else:
            resumed.rename(staging)
        yield staging
    finally:
        with _undisturbed():
            shutil.rmtree(staging, ignore_errors=True)
            _active.discard(staging)


def _replace(staging: Path, out: Path) -> None:
    if not _is_ours(out):
        staging.rename(out)  # to a free name, or atomically over an empty folder
    else:
        old = out.parent / staging.name.replace(".partial-", ".old-")
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C, and what the command line handles like it, waits until the block is done."""
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread is ever interrupted
    before = {n: handler for n in numbers if callable(handler := signal.getsignal(n))}
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def left_behind(out: Path) -> list[Path]:
    """The folders that runs for the output ``out`` were writing in when they were killed."""
    return _leftovers(out.absolute(), "partial")


def _leftovers(out: Path, kind: str) -> list[Path]:
    """The hidden folders that dead runs left for ``out``."""
    if not out.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{out.name}.{kind}-") + r"(\d+)(?:\.\d+)?")
    found = [(p, match) for p in out.parent.iterdir() if (match := pattern.fullmatch(p.name))]
    return sorted(path for path, match in found if not _in_use(path, kind, int(match[1])))


def _in_use(path: Path, kind: str, pid: int) -> bool:
    if pid == os.getpid():
        return path.with_name(path.name.replace(f".{kind}-", ".partial-")) in _active
    return _alive(pid)


def _restore(out: Path) -> None:
    """Bring back what a run was replacing when it was killed."""
    for old in _leftovers(out, "old"):
        if not os.path.lexists(out) and _is_ours(old):
            old.rename(out)


def _remove_stale(out: Path, kept: Path | None) -> None:
    """Remove what killed runs left behind for the same destination, but for ``kept``."""
    for path in [*_leftovers(out, "partial"), *_leftovers(out, "old")]:
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
