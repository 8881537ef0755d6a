"""Whether a machine was quiet enough to measure on, and if not, why not, in words.

What disturbs is looked for where it comes from (:class:`Pulse`: other programs, the host of a
virtual machine, a falling clock) and where it shows (the baseline, which is timed all the time, and
should take the same all the time). A machine that is slower from the first round to the last, as
beside busy neighbours on one host, shows only beside another run: by its :func:`pace`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from qkit.report.machine import file_text
from qkit.report.statistics import Series, as_series

# The share of all processors that others may use, and that of the host of a virtual machine.
MAX_OTHERS, MAX_STOLEN = 0.05, 0.01
# By how much the clock may be lower at the end than at the start.
MAX_CLOCK_LOSS = 0.05
# By how much the baseline may change from the first third of a measurement to the last, and from
# one start to another.
MAX_DRIFT, MAX_RESTART = 0.05, 0.05
# (p90 - p10) / median of the baseline's rounds in one start.
MAX_SPREAD = 0.2
# Each of the three parts that are compared must have some rounds.
MIN_THIRD = 3
# By how much the pace may change within a run, or from one to another.
MAX_PACE = 0.1
# The work of the pace: a product of square matrices of so many rows, and so many turns of a loop;
# done so often, after some times to wake the threads.
PACE_ROWS, PACE_TURNS, PACE_WARM, PACE_TIMES = 256, 3000, 20, 100


@dataclass(frozen=True)
class Pulse:
    """The state of the machine at one time; None for what the system does not tell.

    ``busy``, ``stolen`` and ``ticks``: what all processors did, took for the host, and could have
    done since they were started, in ticks; ``own`` the seconds of this process and of those it has
    waited for; ``megahertz`` the fastest clock; ``throttled`` how often they were too hot;
    ``load`` the load average of the last minute; ``pace`` see :func:`pace`.
    """

    busy: int | None = None
    stolen: int | None = None
    ticks: int | None = None
    own: float = 0.0
    megahertz: float | None = None
    throttled: int | None = None
    load: float | None = None
    pace: float | None = None


def pace() -> float:
    """Milliseconds that a fixed piece of work takes now: a product of two fp32 matrices of 256
    rows, on all of torch's threads, and 3000 turns of a loop in Python (the median of 100 times,
    some 40 ms in all). A figure of the machine and its state, for comparing two runs; by itself it
    says nothing. A guest at work on the other half of a core slows the loop down by 1.6, as it does
    most programs, and the product, which wants one unit of the core, by 1.1."""
    a = torch.ones(PACE_ROWS, PACE_ROWS)
    times = []
    with torch.no_grad():
        for _ in range(PACE_WARM + PACE_TIMES):
            start = perf_counter()
            torch.mm(a, a)
            turns = 0
            for turn in range(PACE_TURNS):
                turns += turn
            times.append(perf_counter() - start)
    return round(1e3 * float(np.median(times[PACE_WARM:])), 5)


def pulse(root: Path = Path("/")) -> Pulse:
    """The state of the machine now, but for its pace, from the system's files below ``root``."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    busy = stolen = ticks = None
    line = file_text(root / "proc/stat").partition("\n")[0].split()
    if line[:1] == ["cpu"] and len(line) > 8:
        counts = [int(n) for n in line[1:9]]  # user nice system idle iowait irq softirq steal
        ticks, stolen = sum(counts), counts[7]
        busy = ticks - counts[3] - counts[4] - stolen
    clocks = [
        float(row.partition(":")[2])
        for row in file_text(root / "proc/cpuinfo").splitlines()
        if row.startswith("cpu MHz")
    ]
    hot = [
        int(text)
        for path in (root / "sys/devices/system/cpu").glob(
            "cpu*/thermal_throttle/core_throttle_count"
        )
        if (text := file_text(path).strip()).isdecimal()
    ]
    load = file_text(root / "proc/loadavg").split()
    return Pulse(
        busy,
        stolen,
        ticks,
        own,
        max(clocks, default=None),
        sum(hot) if hot else None,
        float(load[0]) if load else None,
    )


@dataclass(frozen=True)
class Noise:
    """``quiet`` unless there are ``reasons`` for doubt. The figures behind it, where known:
    ``others`` and ``stolen`` shares of the processors' time, ``load`` average before it began,
    clock in ``megahertz`` and :func:`pace` in milliseconds before and after; of the baseline, the
    largest ``drift``, ``spread`` and ``restart`` (:func:`judge`)."""

    quiet: bool
    reasons: tuple[str, ...] = ()
    others: float | None = None
    stolen: float | None = None
    load: float | None = None
    megahertz: tuple[float, float] | None = None
    drift: float | None = None
    spread: float | None = None
    restart: float | None = None
    pace: tuple[float, float] | None = None

    @staticmethod
    def from_json(data: dict[str, Any]) -> Noise:
        """What ``asdict`` of it gives, as JSON has it (also without a pace, as it once was)."""
        pairs = {name: data.get(name) for name in ("megahertz", "pace")}
        lists = {name: pair and tuple(pair) for name, pair in pairs.items()}
        return Noise(**data | lists | {"reasons": tuple(data["reasons"])})


def judge(before: Pulse, after: Pulse, baseline: Mapping[str, Series]) -> Noise:
    """What speaks against a measurement: two states of the machine, and series of the baseline by
    what they were measured with (``batch 1, 2 threads``)."""
    others, stolen = _shares(before, after)
    figures = {
        "others": (others, MAX_OTHERS, "other programs took {:.0%} of the processors' time"),
        "stolen": (stolen, MAX_STOLEN, "the host of this virtual machine took {:.0%} of its time"),
    }
    reasons = [text.format(n) for n, most, text in figures.values() if n is not None and n > most]
    clocks = None
    if before.megahertz and after.megahertz:
        clocks = (before.megahertz, after.megahertz)
        if clocks[1] < clocks[0] * (1 - MAX_CLOCK_LOSS):
            reasons.append(f"the clock fell from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
    if before.throttled is not None and (after.throttled or 0) > before.throttled:
        times = (after.throttled or 0) - before.throttled
        reasons.append(f"the processor was too hot and slowed down {times} times")
    paces = None
    if before.pace and after.pace:
        paces = (before.pace, after.pace)
        if abs(change := paces[1] / paces[0] - 1) > MAX_PACE:
            how = "longer" if change > 0 else "less"
            reasons.append(f"a fixed piece of work took {abs(change):.0%} {how} at the end")
    worst: dict[str, float] = {}
    for where, series in baseline.items():
        for kind, share, text in _signs(series):
            if abs(share) > abs(worst.get(kind, 0.0)):
                worst[kind] = share
            if text is not None:
                reasons.append(f"{where}: {text}")
    known = (others, stolen, before.load, clocks)
    return Noise(not reasons, tuple(reasons), *known, pace=paces, **_rounded(worst))


def _rounded(figures: Mapping[str, float]) -> dict[str, Any]:
    return {kind: round(share, 4) for kind, share in figures.items()}


def _shares(before: Pulse, after: Pulse) -> tuple[float | None, float | None]:
    """The shares of the processors' time that others used, and that the host took."""
    if before.ticks is None or after.ticks is None or after.ticks <= before.ticks:
        return None, None
    assert before.busy is not None
    assert after.busy is not None
    total = after.ticks - before.ticks
    own = (after.own - before.own) * os.sysconf("SC_CLK_TCK")
    others = max(0.0, after.busy - before.busy - own) / total
    return round(others, 4), round(((after.stolen or 0) - (before.stolen or 0)) / total, 4)


def _signs(values: Series) -> list[tuple[str, float, str | None]]:
    """Each figure of a series of the baseline by name, and what it says if it is too large."""
    series = as_series(values)
    found: list[tuple[str, float, str | None]] = []
    third = series.shape[1] // 3
    if third >= MIN_THIRD:
        changes = np.median(series[:, -third:], axis=1) / np.median(series[:, :third], axis=1) - 1
        drift = float(max(changes, key=abs))
        slower = "slower" if drift > 0 else "faster"
        text = f"the baseline became {abs(drift):.0%} {slower} while it was measured"
        found.append(("drift", drift, text if abs(drift) > MAX_DRIFT else None))
    low, middle, high = np.percentile(series, [10, 50, 90], axis=1)
    spread = float(np.max((high - low) / middle))
    text = f"four fifths of the baseline's rounds are spread over {spread:.0%} of their median"
    found.append(("spread", spread, text if spread > MAX_SPREAD else None))
    if len(series) > 1:
        medians = np.median(series, axis=1)
        restart = float(medians.max() / medians.min() - 1)
        text = f"the baseline's median differed by {restart:.0%} between its starts"
        found.append(("restart", restart, text if restart > MAX_RESTART else None))
    return found
