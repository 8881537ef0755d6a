"""The JSON lines that a benchmark prints: the first one says what was run, where, and of what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def say(**record: Any) -> None:
    """One line; a figure that is not finite is refused."""
    print(json.dumps(record, allow_nan=False), flush=True)


def made() -> dict[str, Any]:
    """The command as it was given, and the commit."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "command": " ".join(["python", str(name), *sys.argv[1:]]),
        "commit": commit(),
    }


def facts() -> dict[str, Any]:
    """What was run, on what machine, in which versions."""
    from qkit.report import machine, versions

    return made() | {"machine": machine(), "versions": versions()}


def tell_head(**more: Any) -> None:
    """The first line."""
    say(**facts(), **more)


def commit() -> str | None:
    """The commit that is checked out, ``+`` behind it if files differ; None where git is not."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
