"""Cells of a benchmark: each a process of its own with a time limit, and one JSON line.

Lines are appended when they are done, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lines import made

Cell = dict[str, Any]


def attempt(script: str, options: Sequence[str], limit: float) -> Cell:
    """What ``script`` with ``options`` prints last, in a process that is stopped after ``limit``
    seconds; where it fails, its ``status`` instead."""
    start, before = time.perf_counter(), of_others()
    try:
        done = subprocess.run(
            [sys.executable, script, *options], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done after {limit:g} s"}
    took = time.perf_counter() - start
    facts = {
        "seconds": round(took, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "load_of_others": round((of_others() - before) / took / (os.cpu_count() or 1), 3),
    }
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode:
        return facts | {"status": lines[-1][:400], "exit": done.returncode}
    return facts | json.loads(done.stdout.splitlines()[-1])


def of_others() -> float:
    """The seconds of processor time that all but our children took; 0 where no one counts."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split()[1:8])
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - ours.ru_utime - ours.ru_stime


def records(path: Path) -> list[Cell]:
    """The lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, record: Cell) -> None:
    """Add a line to a file of results, with the command that measured it."""
    with path.open("a") as file:
        file.write(json.dumps(record | made(), allow_nan=False) + "\n")
