"""Timing contenders beside each other: in turns, and without the calls that others disturbed.

A turn is some calls after one that is not timed and wakes the contender's threads. Another process
on the same cores makes a call many times as long; where a contender has enough calls during which
none of our threads had to wait for a core, only they count: where ``undisturbed`` is less than
``repeats``, there were not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TURN_MS, TURN_CALLS, MAX_CALLS = 10.0, 40, 400
UNDISTURBED = 3  # so many calls are enough to leave the disturbed ones out
WAITED = 0.05  # of a call's time, by all threads together, is disturbed
HOPELESS = 4.0  # times as slow as fp32: two calls tell all there is to know
Call = Callable[[], object]


def digits(value: float, count: int = 3) -> float:
    """``value`` to so many significant digits."""
    return float(f"{value:.{count}g}")


class Waiting:
    """How long the threads of this process have been ready to run without a core (Linux)."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def find_threads(self) -> None:
        """Look for new ones: pools start with their first work."""
        tasks = Path("/proc/self/task")
        for name in (p.name for p in tasks.iterdir()) if tasks.is_dir() else ():
            if name not in self.files:
                self.files[name] = os.open(tasks / name / "schedstat", os.O_RDONLY)

    def ms(self) -> float:
        """Milliseconds so far, of the threads that are known."""
        total = 0
        for name, file in list(self.files.items()):
            try:
                total += int(os.pread(file, 100, 0).split()[1])
            except OSError:  # the thread has ended
                os.close(self.files.pop(name))
        return total / 1e6


WAITING = Waiting()


@dataclass
class Turns:
    """The calls of one contender and what they took."""

    calls: list[Call]
    before: Call | None = None
    taken: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)
    probe: float = 0.0
    spent: float = 0.0
    turn: int = 0

    def call(self) -> float:
        """One call of the next copy, in milliseconds."""
        function = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        if self.before:
            self.before()
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def timed(self) -> None:
        """One call that is remembered."""
        waited = WAITING.ms()
        took = self.call()
        disturbed = WAITING.ms() - waited > WAITED * took
        self.taken.append(took)
        self.disturbed.append(disturbed)
        self.spent += took / 4 if disturbed else took

    def to_json(self) -> dict[str, float]:
        """Median, 10th and 90th percentile of the calls that count, and their number."""
        quiet = [t for t, bad in zip(self.taken, self.disturbed, strict=True) if not bad]
        counted = quiet if len(quiet) >= UNDISTURBED else self.taken
        p10, median, p90 = np.percentile(counted, [10, 50, 90])
        figures = {"median": float(median), "p10": float(p10), "p90": float(p90)}
        return {k: digits(v, 4) for k, v in figures.items()} | {
            "repeats": len(counted),
            "undisturbed": len(quiet),
        }


def interleave(turns: Mapping[str, Turns], seconds: float, base: str) -> None:
    """Call each contender for about ``seconds``, in turns; at least thrice, twice if hopeless."""
    for each in turns.values():
        each.probe = each.call()
        if each.probe < 10 * TURN_MS:
            each.probe = min(each.call(), each.call())
    WAITING.find_threads()
    order = list(turns.values())
    while True:
        slow = HOPELESS * turns[base].probe
        waiting = [
            each
            for each in order
            if each.spent < seconds * 1e3 or len(each.taken) < (2 if each.probe > slow else 3)
        ]
        most = [6 if each.probe > slow else MAX_CALLS for each in waiting]
        waiting = [each for each, n in zip(waiting, most, strict=True) if len(each.taken) < n]
        if not waiting:
            return
        for each in waiting:
            if each.probe < TURN_MS:
                time.sleep(0.0005)  # the threads of the one before fall asleep
                each.call()
            for _ in range(max(1, min(TURN_CALLS, int(TURN_MS / max(each.probe, 1e-3))))):
                each.timed()
        order.reverse()
