"""Two runs of the same benchmarks: what became slower, beyond the noise.

A run is a file that ``qkit bench`` wrote, or pytest-benchmark with ``--benchmark-json``. Unlike two
contenders of one run the runs are not paired: each has its own noise, and the bootstrap draws from
each on its own. What no run shows by itself is what changes from one to the next (where memory
lies, what else the machine does); that is the ``noise`` by which every interval is wider.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import InputError, UsageError, nearest
from qkit.report.bench import KIND, BenchReport
from qkit.report.noise import MAX_PACE
from qkit.report.statistics import (
    LEVEL,
    MIN_ROUNDS,
    SLOWER,
    Interval,
    Series,
    as_series,
    separate_ratio,
)
from qkit.report.text import as_text

FORMAT = 1
BENCH, PYTEST = "qkit bench", "pytest-benchmark"
NOISE = 0.05
# A long series is that of the medians of so many blocks of calls in a row.
MAX_ROUNDS = 200
# What makes two machines two, as far as both files tell.
_MACHINE = ("cpu", "arch", "isa", "cores", "threads")


@dataclass(frozen=True)
class Run:
    """One file: what wrote it, where and when, and milliseconds ``[starts, rounds]`` by name;
    ``pace`` is that of the machine then (:func:`~qkit.report.noise.pace`), if the file tells."""

    path: str
    maker: str
    series: Mapping[str, Series]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    commit: str | None = None
    remarks: tuple[str, ...] = ()
    pace: float | None = None

    def facts(self) -> dict[str, Any]:
        """All but the series, as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "series"}


@dataclass(frozen=True)
class Change:
    """A benchmark before and after (medians, in ms): ``ratio`` times as fast, between ``low`` and
    ``high``, of which ``verdict`` says what may be said once both are wider by the noise."""

    name: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Changes:
    """Two runs, benchmark by benchmark. ``gone`` and ``new`` are those that one run alone has.

    ``drift`` is how many times as fast the ``control`` was, the benchmarks that did not change;
    every ratio is relative to it. 1 without a control.
    """

    before: Run
    after: Run
    rows: tuple[Change, ...]
    noise: float
    level: float
    control: str | None
    drift: float
    gone: tuple[str, ...]
    new: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def slower(self) -> list[Change]:
        """The regressions, the worst first."""
        found = [row for row in self.rows if row.verdict == SLOWER]
        return sorted(found, key=lambda row: row.ratio)

    def to_json(self) -> dict[str, Any]:
        """This as plain data."""
        rest = asdict(self) | {"before": self.before.facts(), "after": self.after.facts()}
        return {"format": FORMAT, "kind": "changes"} | rest

    def dumps(self) -> str:
        """This as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())


def read_run(path: str | Path) -> Run:
    """The run of a file; :class:`~qkit.errors.InputError` if it is none."""
    where = str(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the run: {error}", where=where) from error
    try:
        if isinstance(data, dict) and data.get("kind") == KIND:
            return _of_bench(where, BenchReport.from_json(data))
        if isinstance(data, dict) and {"benchmarks", "machine_info"} <= data.keys():
            return _of_pytest(where, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the run is damaged: {type(error).__name__}: {error}", where=where
        ) from error
    raise InputError(
        "not a run of benchmarks",
        where=where,
        got=", ".join(map(str, list(data)[:6])) if isinstance(data, dict) else type(data).__name__,
        wanted="bench.json of qkit bench, or what pytest --benchmark-json=FILE writes",
    )


def _of_bench(where: str, report: BenchReport) -> Run:
    """Each contender in each place is a benchmark."""
    series: dict[str, Series] = {}
    remarks = [f"noisy: {reason}" for reason in report.noise.reasons]
    for each in report.contenders:
        for timing in each.timings:
            _add(series, remarks, f"{each.name}, {timing.place}", timing.rounds)
    pace = report.noise.pace
    return Run(
        *(where, BENCH, series, report.machine, report.versions, report.date),
        remarks=tuple(remarks),
        pace=None if pace is None else sum(pace) / 2,
    )


def _of_pytest(where: str, data: Mapping[str, Any]) -> Run:
    series: dict[str, Series] = {}
    remarks: list[str] = []
    for each in data["benchmarks"]:
        seconds = each["stats"].get("data")
        if seconds is None:
            raise InputError(
                "the file has no timings, only what sums them up",
                where=f"{where}: {each['fullname']}",
                fix="pytest --benchmark-json=FILE, or --benchmark-save-data",
            )
        _add(series, remarks, each["fullname"], _condensed(np.asarray(seconds) * 1e3))
    about = data["machine_info"]
    ours = about.get("qkit", {})
    cpu = about.get("cpu", {})
    told = {
        "cpu": cpu.get("brand_raw"),
        "arch": about.get("machine"),
        "cores": cpu.get("count"),
    }
    machine = ours.get("machine") or {key: value for key, value in told.items() if value}
    versions = ours.get("versions") or {"python": about.get("python_version", "")}
    commit = (data.get("commit_info") or {}).get("id")
    date = data.get("datetime", "")
    return Run(where, PYTEST, series, machine, versions, date, commit, tuple(remarks))


def _add(series: dict[str, Series], remarks: list[str], name: str, values: Series) -> None:
    """One benchmark, unless it has too few rounds to say anything."""
    if sum(map(len, values)) < MIN_ROUNDS:
        remarks.append(f"left out, for want of {MIN_ROUNDS} rounds: {name}")
        return
    found = as_series(values)
    if found.min() <= 0:
        raise ValueError(f"{name} took no time")
    series[name] = found


def _condensed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One start of these ``values``, or of the medians of :data:`MAX_ROUNDS` blocks of them."""
    if len(values) > MAX_ROUNDS:
        values = np.array([np.median(block) for block in np.array_split(values, MAX_ROUNDS)])
    return values[None]


def compare_runs(
    before: Run,
    after: Run,
    *,
    noise: float = NOISE,
    control: str | None = None,
    force: bool = False,
) -> Changes:
    """What changed from one run to the other, benchmark by benchmark, in the order of ``after``.

    A benchmark is slower (or faster) if the interval of the ratio, wider by ``noise`` at both
    ends, does not include 1. ``control`` is a pattern of the names of benchmarks that did not
    change, such as ``*torch*``: the median of their ratios is what the machine did in between, and
    all ratios are relative to it.

    Raises :class:`~qkit.errors.InputError` if no benchmark is in both, or, unless ``force``, if the
    runs are of two machines; :class:`~qkit.errors.UsageError` for a ``control`` that matches none.
    """
    if before.maker != after.maker:
        raise InputError("the runs are of two kinds", got=f"{before.maker} and {after.maker}")
    shared = [name for name in after.series if name in before.series]
    if not shared:
        raise InputError(
            "no benchmark is in both runs",
            got=f"{_some(before.series)} in {before.path}, {_some(after.series)} in {after.path}",
        )
    remarks = [f"{run.path}: {remark}" for run in (before, after) for remark in run.remarks]
    if other := _differences(before.machine, after.machine, _MACHINE):
        told = "; ".join(other)
        if not force:
            raise InputError(
                "the runs are of two machines: times say nothing about the code",
                got=told,
                fix="measure both on one machine, or --force (force=True)",
            )
        remarks.append(f"two machines: {told}")
    packages = [name for name in before.versions if name in after.versions and name != "qkit"]
    remarks += _differences(before.versions, after.versions, packages)
    if before.pace and after.pace and abs(slower := after.pace / before.pace - 1) > MAX_PACE:
        how = "slower" if slower > 0 else "faster"
        remarks.append(
            f"the machine itself was {how} the second time: a fixed piece of work took "
            f"{after.pace / before.pace:.2f} times as long"
        )
    found = {name: separate_ratio(before.series[name], after.series[name]) for name in shared}
    drift = _drift(found, control)
    rows = []
    for name, interval in found.items():
        ratio = Interval(*(end / drift for end in (interval.value, interval.low, interval.high)))
        slow, fast = (float(np.median(run.series[name])) for run in (before, after))
        verdict = ratio.widened(noise).verdict
        rows.append(Change(name, slow, fast, ratio.value, ratio.low, ratio.high, verdict))
    if control is not None:
        remarks.append(f"the control is {drift:.3f} times as fast; ratios are relative to it")
    elif len(found) > 1 and abs(np.log(_typical(found))) > np.log1p(noise):
        remarks.append(
            f"half of the benchmarks are {_typical(found):.3f} times as fast or less: where the "
            "machine may have changed, --control NAMES tells it from the code"
        )
    return Changes(
        *(before, after, tuple(rows), noise, LEVEL, control, drift),
        gone=tuple(name for name in before.series if name not in after.series),
        new=tuple(name for name in after.series if name not in before.series),
        remarks=tuple(remarks),
    )


def _some(series: Mapping[str, Series]) -> str:
    names = list(series)
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "none"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], keys: Any) -> list[str]:
    """What both tell, and differently, in words."""

    def text(value: Any) -> str:
        return " ".join(value) if isinstance(value, list) else str(value)

    return [
        f"{key}: {text(a[key])} before, {text(b[key])} after"
        for key in keys
        if a.get(key) is not None and b.get(key) is not None and a[key] != b[key]
    ]


def _typical(found: Mapping[str, Interval]) -> float:
    return float(np.median([interval.value for interval in found.values()]))


def _drift(found: Mapping[str, Interval], control: str | None) -> float:
    if control is None:
        return 1.0
    chosen = {name: each for name, each in found.items() if fnmatchcase(name, control)}
    if not chosen:
        raise UsageError(
            "no benchmark that both runs have matches the control",
            got=repr(control),
            wanted=f"a pattern of names such as {nearest(control, found, 3)}",
        )
    return _typical(chosen)
