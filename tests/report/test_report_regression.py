"""Two runs of benchmarks: what is slower is found, and what is the same is not reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkit.errors import InputError, UsageError
from qkit.report.bench import BenchReport, Contender, Timing
from qkit.report.noise import Noise
from qkit.report.regression import MAX_ROUNDS, NOISE, Run, compare_runs, read_run

CPU = {"brand_raw": "a processor", "count": 2}


def timings(median: float, seed: int, rounds: int = 60, spread: float = 0.03) -> list[float]:
    """Seconds: mostly near the median, with a tail, as those of a machine are."""
    random = np.random.default_rng(seed)
    tail = random.exponential(spread, rounds)
    return list(median * (1 + random.normal(0, spread, rounds) + tail))


def pytest_file(path: Path, times: dict[str, Sequence[float]], **info: Any) -> Path:
    """A file as pytest-benchmark writes it."""
    benchmarks = [
        {"fullname": name, "stats": {"data": list(data), "median": float(np.median(data))}}
        for name, data in times.items()
    ]
    about = {"cpu": CPU, "machine": "x86_64", "python_version": "3.11.7"} | info
    data = {"benchmarks": benchmarks, "machine_info": about, "datetime": "2026-11-27T12:00:00"}
    path.write_text(json.dumps(data | {"commit_info": {"id": "abc"}}))
    return path


def run_of(tmp_path: Path, name: str, times: dict[str, Sequence[float]], **info: Any) -> Run:
    return read_run(pytest_file(tmp_path / f"{name}.json", times, **info))


def test_a_slowed_benchmark_is_found_and_the_others_are_not(tmp_path: Path) -> None:
    before = {f"b{i}": timings(1e-3 * (i + 1), seed=i) for i in range(8)}
    after = {f"b{i}": timings(1e-3 * (i + 1), seed=100 + i) for i in range(8)}
    after["b3"] = [t * 1.3 for t in after["b3"]]
    after["b5"] = [t / 1.5 for t in after["b5"]]
    changes = compare_runs(run_of(tmp_path, "a", before), run_of(tmp_path, "b", after))
    verdicts = {row.name: row.verdict for row in changes.rows}
    assert [row.name for row in changes.slower] == ["b3"]
    assert verdicts.pop("b3") == "slower"
    assert verdicts.pop("b5") == "faster"
    assert set(verdicts.values()) == {"not distinguishable"}
    slow = changes.slower[0]
    assert slow.low < 1 / 1.3 < slow.high
    assert slow.before == pytest.approx(4.0, rel=0.1)
    assert slow.after == pytest.approx(5.2, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_what_did_not_change_is_not_reported(tmp_path: Path, seed: int) -> None:
    names = [f"b{i}" for i in range(5)]
    runs = [
        run_of(tmp_path, when, {n: timings(1.0, seed=1000 * seed + 10 * i + k) for i, n in
                                enumerate(names)})
        for k, when in enumerate(("a", "b"))
    ]  # fmt: skip
    changes = compare_runs(*runs)
    assert {row.verdict for row in changes.rows} == {"not distinguishable"}
    assert all(row.low <= row.ratio <= row.high for row in changes.rows)


def test_a_run_is_the_same_as_itself(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", {"b": timings(1.0, seed=0)})
    (row,) = compare_runs(run, run, noise=0.0).rows
    assert (row.ratio, row.verdict) == (1.0, "not distinguishable")


def test_what_is_within_the_noise_is_not_reported(tmp_path: Path) -> None:
    still = {"b": timings(1.0, seed=0, spread=1e-4)}
    slowed = {"b": [1.04 * t for t in still["b"]]}
    runs = run_of(tmp_path, "a", still), run_of(tmp_path, "b", slowed)
    assert NOISE > 0.04
    assert not compare_runs(*runs).slower
    assert compare_runs(*runs, noise=0.02).slower


def test_of_two_rounds_nothing_is_said(tmp_path: Path) -> None:
    times = {"few": [1.0, 2.0], "many": timings(1.0, seed=0)}
    changes = compare_runs(*(run_of(tmp_path, name, times) for name in "ab"))
    assert [row.name for row in changes.rows] == ["many"]
    assert any("few" in remark for remark in changes.remarks)


def test_a_wide_series_says_little(tmp_path: Path) -> None:
    before = {"b": [1.0, 9.0, 2.0, 8.0, 1.5]}
    after = {"b": [2.0, 9.5, 3.0, 8.5, 2.5]}
    (row,) = compare_runs(run_of(tmp_path, "a", before), run_of(tmp_path, "b", after)).rows
    assert row.verdict == "not distinguishable"


def test_a_long_series_is_made_of_blocks(tmp_path: Path) -> None:
    data = timings(1.0, seed=0, rounds=10_007)
    (series,) = run_of(tmp_path, "a", {"b": data}).series.values()
    assert np.shape(series) == (1, MAX_ROUNDS)
    assert float(np.median(series)) == pytest.approx(1e3 * float(np.median(data)), rel=0.01)


def test_a_control_tells_the_machine_from_the_code(tmp_path: Path) -> None:
    before = {f"torch[{i}]": timings(1.0, seed=i) for i in range(3)}
    before |= {"ours": timings(1.0, seed=8), "broken": timings(1.0, seed=9)}
    after = {name: [1.4 * t for t in data] for name, data in before.items()}
    after["broken"] = [2.0 * t for t in before["broken"]]
    runs = run_of(tmp_path, "a", before), run_of(tmp_path, "b", after)
    plain = compare_runs(*runs)
    assert len(plain.slower) == 5
    assert any("--control" in remark for remark in plain.remarks)
    told = compare_runs(*runs, control="torch*")
    assert [row.name for row in told.slower] == ["broken"]
    assert told.drift == pytest.approx(1 / 1.4)
    assert told.slower[0].ratio == pytest.approx(1.4 / 2.0)
    with pytest.raises(UsageError, match="matches the control"):
        compare_runs(*runs, control="nothing*")


@pytest.mark.parametrize(("pace", "told"), [(0.3, "slower"), (0.15, "faster"), (0.205, None)])
def test_a_slower_machine_is_told_by_its_pace(tmp_path: Path, pace: float, told: str | None):
    before, after = (run_of(tmp_path, name, {"b": timings(1.0, seed=0)}) for name in ("a", "b"))
    changes = compare_runs(replace(before, pace=0.2), replace(after, pace=pace))
    found = [remark for remark in changes.remarks if "fixed piece of work" in remark]
    assert len(found) == (told is not None)
    assert told is None or told in found[0]
    assert not any("fixed piece" in remark for remark in compare_runs(before, after).remarks)


def test_what_one_run_alone_has_is_named(tmp_path: Path) -> None:
    data = timings(1.0, seed=0)
    changes = compare_runs(
        run_of(tmp_path, "a", {"old": data, "both": data}),
        run_of(tmp_path, "b", {"both": data, "new": data}),
    )
    assert (changes.gone, changes.new) == (("old",), ("new",))
    assert [row.name for row in changes.rows] == ["both"]


def test_runs_without_a_benchmark_in_common_are_refused(tmp_path: Path) -> None:
    data = timings(1.0, seed=0)
    with pytest.raises(InputError, match="no benchmark is in both") as caught:
        compare_runs(run_of(tmp_path, "a", {"x": data}), run_of(tmp_path, "b", {"y": data}))
    assert caught.value.exit_code == 3


def test_runs_of_two_machines_are_refused_unless_forced(tmp_path: Path) -> None:
    data = {"b": timings(1.0, seed=0)}
    other = run_of(tmp_path, "b", data, cpu={"brand_raw": "another", "count": 2})
    here = run_of(tmp_path, "a", data)
    with pytest.raises(InputError, match=r"a processor before, another after.*--force"):
        compare_runs(here, other)
    changes = compare_runs(here, other, force=True)
    assert any(remark.startswith("two machines: cpu") for remark in changes.remarks)
    # What only one file tells is no difference.
    assert compare_runs(here, run_of(tmp_path, "c", data, cpu={})).rows


def test_our_own_facts_come_before_those_of_pytest(tmp_path: Path) -> None:
    data = {"b": timings(1.0, seed=0)}
    facts = {"machine": {"cpu": "p", "threads": 2}, "versions": {"torch": "2.13.0"}}
    newer = {"machine": {"cpu": "p", "threads": 1}, "versions": {"torch": "2.14.0"}}
    a, b = (run_of(tmp_path, n, data, qkit=q) for n, q in (("a", facts), ("b", newer)))
    with pytest.raises(InputError, match="threads: 2 before, 1 after"):
        compare_runs(a, b)
    assert "torch: 2.13.0 before, 2.14.0 after" in compare_runs(a, b, force=True).remarks


def test_json(tmp_path: Path) -> None:
    data = {"b": timings(1.0, seed=0)}
    changes = compare_runs(*(run_of(tmp_path, name, data) for name in "ab"))
    told = json.loads(changes.dumps())
    assert told["kind"] == "changes"
    assert told["rows"][0]["name"] == "b"
    assert told["before"]["commit"] == "abc"
    assert "series" not in told["before"]


def bench_file(path: Path, slowdown: float, seed: int) -> Path:
    """A file of qkit bench with two contenders on two numbers of threads, one of them slowed."""

    def timing(threads: int, factor: float) -> Timing:
        rounds = [[1e3 * t * factor for t in timings(1e-3, seed + k + threads)] for k in (0, 10)]
        middle = float(np.median(rounds))
        series = tuple(map(tuple, rounds))
        return Timing(1, threads, middle, middle, middle, middle, 120, 1e3, None, series)

    contenders = [
        Contender(name, "model", name, timings=tuple(timing(n, factor) for n in (1, 2)))
        for name, factor in (("net.pt", 1.0), ("artifact", slowdown))
    ]
    failed = Contender("broken", "onnx", "broken", failure="loading: no graph")
    report = BenchReport("net.pt", (*contenders, failed), Noise(False, ("others ran",)), (1,),
                         (1, 2), {}, 2)  # fmt: skip
    path.write_text(report.dumps())
    return path


def test_runs_of_qkit_bench_are_compared_by_contender_and_place(tmp_path: Path) -> None:
    before = read_run(bench_file(tmp_path / "a.json", 1.0, seed=1))
    changes = compare_runs(before, read_run(bench_file(tmp_path / "b.json", 1.5, seed=3)))
    assert {row.name: row.verdict for row in changes.rows} == {
        "net.pt, batch 1, 1 thread": "not distinguishable",
        "net.pt, batch 1, 2 threads": "not distinguishable",
        "artifact, batch 1, 1 thread": "slower",
        "artifact, batch 1, 2 threads": "slower",
    }
    assert any(remark.endswith("noisy: others ran") for remark in changes.remarks)
    same = compare_runs(before, read_run(bench_file(tmp_path / "c.json", 1.0, seed=5)))
    assert not same.slower
    other = run_of(tmp_path, "d", {"b": timings(1.0, seed=0)})
    with pytest.raises(InputError, match="two kinds"):
        compare_runs(before, other)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "cannot read the run"),
        ("{", "cannot read the run"),
        ("[1, 2]", "not a run of benchmarks"),
        ('{"layers": []}', "not a run of benchmarks"),
        ('{"kind": "bench", "format": 9}', "unknown report format"),
        ('{"kind": "bench", "format": 1, "contenders": 3}', "not iterable"),
        ('{"benchmarks": [{"fullname": "b"}], "machine_info": {}}', "damaged"),
        ('{"benchmarks": 7, "machine_info": {}}', "damaged"),
        ('{"benchmarks": [{"fullname": "b", "stats": {"median": 1}}], "machine_info": {}}',
         "no timings"),
        ('{"benchmarks": [{"fullname": "b", "stats": {"data": [1, 1, 1, 1, NaN]}}], '
         '"machine_info": {}}', "damaged"),
        ('{"benchmarks": [{"fullname": "b", "stats": {"data": [1, 1, 1, 1, 0]}}], '
         '"machine_info": {}}', "took no time"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_run(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the run"):
        read_run(tmp_path / "none.json")
