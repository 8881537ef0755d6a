"""Running the real ``qkit`` command as a user does, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# One thread: tests run on small machines, and bit-identical results need equal thread counts.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one strict JSON document."""

        def refuse(text: str) -> None:
            raise AssertionError(f"not strict JSON: {text}")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def error(self) -> str:
        """The message of a failure: the last line, with no traceback before it."""
        assert "Traceback" not in self.err, self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("qkit: "), self.err
        return last.removeprefix("qkit: error: ").removeprefix("qkit: ")


def python(
    *args: str, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any
) -> Done:
    """``python`` with ``args``."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=ENVIRONMENT | (env or {}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def qkit(
    *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any
) -> Done:
    """``python -m qkit`` with ``args``."""
    flags = ["-P"] if sys.version_info >= (3, 11) else []
    return python(*flags, "-m", "qkit", *map(str, args), cwd=cwd, env=env, **options)


def files(folder: Path) -> dict[str, bytes]:
    """The contents of every file in ``folder``, hidden ones too, by relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    """Everything directly in ``folder``, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def disk(at: Path, options: str) -> Iterator[Path]:
    """A memory disk mounted at ``at``, or a visible skip."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a disk: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def verify_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``qkit.verify`` run its worker here: all that it does but the process of its own."""
    from qkit.flows import worker

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, worker.main(command[-1]), "", "")

    fake = types.SimpleNamespace(run=run)
    monkeypatch.setattr(sys.modules["qkit.flows.verify"], "subprocess", fake)
