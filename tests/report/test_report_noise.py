"""A noisy machine is told from a quiet one, for each reason by itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from qkit.report.noise import MAX_DRIFT, Noise, Pulse, judge, pace, pulse

TICKS = os.sysconf("SC_CLK_TCK")
BEFORE = Pulse(0, 0, 0, 0.0, 3000.0, 0, 0.1)
# Ten seconds on two processors, one of which was busy with our own processes.
AFTER = Pulse(10 * TICKS, 0, 20 * TICKS, 10.0, 3000.0, 0, 1.0)
QUIET = {"batch 1, 1 thread": np.random.default_rng(0).normal(1, 0.01, (2, 30))}


def reasons(after: Pulse = AFTER, series: dict = QUIET, before: Pulse = BEFORE) -> str:
    found = judge(before, after, series)
    assert found.quiet == (not found.reasons)
    return "; ".join(found.reasons)


def test_quiet():
    found = judge(BEFORE, AFTER, QUIET)
    assert (found.quiet, found.reasons) == (True, ())
    assert (found.others, found.stolen, found.load) == (0.0, 0.0, 0.1)
    assert abs(found.drift) < MAX_DRIFT
    assert 0 < found.spread < 0.1
    assert 0 <= found.restart < 0.05


def test_nothing_is_known():
    assert judge(Pulse(), Pulse(), {}) == Noise(True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"busy": 14 * TICKS}, "other programs took 20%"),
        ({"stolen": TICKS}, "the host of this virtual machine took 5%"),
        ({"megahertz": 2000.0}, "the clock fell from 3000 to 2000 MHz"),
        ({"throttled": 3}, "slowed down 3 times"),
        ({"pace": 0.3}, "a fixed piece of work took 50% longer at the end"),
        ({"pace": 0.1}, "a fixed piece of work took 50% less at the end"),
    ],
)
def test_what_the_system_tells(change, told):
    assert told in reasons(replace(AFTER, **change), before=replace(BEFORE, pace=0.2))


def test_our_own_work_is_no_noise():
    assert not reasons(replace(AFTER, busy=20 * TICKS, own=20.0))


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_a_drift(factor):
    series = QUIET["batch 1, 1 thread"] * np.linspace(1, factor, 30)
    told = reasons(series={"batch 8, 2 threads": series})
    assert "batch 8, 2 threads: the baseline became" in told
    assert ("slower" if factor > 1 else "faster") in told
    assert judge(BEFORE, AFTER, {"": series}).drift == pytest.approx(factor - 1, rel=0.4)


def test_a_spread():
    series = np.random.default_rng(0).lognormal(0, 0.5, (1, 200))
    assert "spread over" in reasons(series={"": series})


def test_starts_that_differ():
    series = QUIET["batch 1, 1 thread"] * np.array([[1.0], [1.2]])
    assert reasons(series={"": series}) == (
        ": the baseline's median differed by 21% between its starts"
    )


def test_too_few_rounds_for_a_drift():
    assert judge(BEFORE, AFTER, {"": np.linspace(1, 1.1, 8)[None]}).drift is None


def test_json():
    found = judge(BEFORE, replace(AFTER, throttled=1), QUIET)
    again = Noise.from_json(json.loads(json.dumps(asdict(found), allow_nan=False)))
    assert again == found
    assert Noise.from_json(asdict(Noise(True))) == Noise(True)
    old = {key: value for key, value in asdict(found).items() if key != "pace"}
    assert Noise.from_json(old) == found


# The pulse


def test_the_pace_is_that_of_a_piece_of_work():
    """In seconds more than 10^13 multiply-adds a second would take, and 10^10 turns of a loop."""
    assert 256**3 / 1e13 + 3000 / 1e10 < pace() / 1e3 < 1


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_the_files_of_the_system(tmp_path):
    write(tmp_path, "proc/stat", "cpu  10 1 4 100 5 2 3 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    write(tmp_path, "proc/cpuinfo", "cpu MHz\t\t: 2100.5\nmodel name: x\ncpu MHz\t\t: 2800.0\n")
    write(tmp_path, "proc/loadavg", "0.52 0.40 0.30 1/100 4321\n")
    for cpu in (0, 1):
        write(
            tmp_path,
            f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count",
            f"{cpu + 1}\n",
        )
    found = pulse(tmp_path)
    assert (found.busy, found.stolen, found.ticks) == (20, 7, 132)
    assert (found.megahertz, found.throttled, found.load) == (2800.0, 3, 0.52)


def test_no_such_files(tmp_path):
    assert replace(pulse(tmp_path), own=0.0) == Pulse()


def test_the_work_of_this_process_counts_as_its_own():
    before = pulse()
    while pulse().own < before.own + 0.05:
        pass
    assert pulse().own > before.own
