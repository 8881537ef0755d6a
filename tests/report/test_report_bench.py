"""The report of a bench: JSON there and back, and the same figures in every text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qkit.errors import InputError
from qkit.report import machine, versions
from qkit.report.bench import BenchReport, Contender, Difference, Speed, Timing, place
from qkit.report.bench_text import as_markdown, grids, sentences
from qkit.report.noise import Noise
from qkit.report.statistics import Interval
from qkit.report.text import duration, markdown_table

TIMING = Timing(1, 2, 2.0, 2.5, 1.9, 2.1, 40, 500.0, None, ((2.0, 2.1, 1.9), (2.0, 2.0, 2.2)))
BASE = Contender(
    "net.pt",
    "model",
    "/models/net.pt",
    1000,
    runtime="torch 2, eager",
    load_ms=12.0,
    cold_start_ms=3.0,
    timings=(TIMING, replace(TIMING, batch=8, throughput=1234.5)),
    peak_memory_bytes=300_000_000,
    base_memory_bytes=250_000_000,
    error=Difference(None, 1.0, 0.0, 1.0, 0.0, 64, 1),
    metric=98.25,
)
FAST = replace(
    BASE,
    name="a|b <script>",
    kind="qkit",
    scheme="w8a16",
    size_bytes=None,
    timings=(replace(TIMING, median=1.0, speed=Speed(2.0, 1.8, 2.2, "faster")),),
    error=Difference(31.25, 0.9991, 0.125, None, None, 64, 1),
    metric=None,
    kernels={"qkit::linear[avx512]": 2},
    remarks=("a remark",),
)
FAILED = Contender("broken.onnx", "onnx", "/models/broken.onnx", 10, failure="loading: no graph")


def full() -> BenchReport:
    return BenchReport(
        "net.pt",
        (BASE, FAST, FAILED),
        Noise(False, ("the clock fell",), 0.1, 0.0, 0.5, (3000.0, 2000.0), 0.1, 0.2, None),
        (1, 8),
        (2,),
        {"origin": "x.npz", "samples": 5, "shapes": {"0": "float32 5x3"}},
        2,
        metric="mine:accuracy",
        remarks=("samples are repeated",),
        command="qkit bench net.pt",
        date="2026-01-01T00:00:00+00:00",
        seconds=1.5,
        versions=versions(),
        machine=machine(),
    )


def test_json_round_trip():
    report = full()
    again = BenchReport.from_json(json.loads(report.dumps()))
    assert again == report
    assert again.dumps() == report.dumps()
    assert BenchReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"kind": "pruning"},
        {"contenders": None},
        {"noise": {}},
        {"contenders": [{}]},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_no_such_report_is_refused(change):
    with pytest.raises(InputError, match="report"):
        BenchReport.from_json(full().to_json() | change)


def test_who_failed():
    assert [each.name for each in full().failed] == ["broken.onnx"]
    assert BASE.timing(8, 2).batch == 8
    assert BASE.timing(8, 1) is None


def test_every_figure_is_in_the_tables():
    costs, outputs, times, kernels = grids(full())
    row = dict(zip(costs.head, costs.rows[1], strict=True))
    row |= dict(zip(outputs.head, outputs.rows[1], strict=True))
    assert row["scheme"] == "w8a16"
    assert row["SQNR"] == "31.2 dB"
    assert (row["peak memory"], row["before loading"]) == ("300 MB", "250 MB")
    assert (row["size"], row["top-1"], row["KL"]) == ("n/a",) * 3
    assert row["mine:accuracy"] == "n/a"
    assert dict(zip(outputs.head, outputs.rows[0], strict=True))["mine:accuracy"] == "98.25"
    assert set(costs.rows[2][3:]) - {"10 B"} == {"n/a"} == set(outputs.rows[2][1:])
    assert [r[0] for r in times.rows] == ["net.pt", "a|b <script>", "net.pt"]
    assert times.rows[0][-1] == "the baseline"
    assert times.rows[1][3:] == (
        *("1 ms", "1.9 ms to 2.1 ms", "2.5 ms", "500", "2.00x, 1.80 to 2.20: faster"),
    )
    assert kernels.rows == (("a|b <script>", "qkit::linear[avx512] x2"),)


def test_an_infinite_error_is_not_exact():
    worst = replace(BASE, error=replace(BASE.error, max_abs=None))
    outputs = grids(replace(full(), contenders=(BASE, worst)))[1]
    shown = [dict(zip(outputs.head, row, strict=True)) for row in outputs.rows]
    assert [(row["SQNR"], row["max error"]) for row in shown] == [
        ("exact", "0"),
        ("none", "infinite"),
    ]


def test_sentences_say_what_went_wrong_first():
    lines = sentences(full())
    assert lines[0] == "broken.onnx failed: loading: no graph"
    assert lines[1] == "noise: the clock fell"
    assert "a|b <script>: a remark" in lines
    assert "samples are repeated" in lines
    assert sentences(replace(full(), contenders=(BASE,), noise=Noise(True)))[0] == (
        "the machine was quiet"
    )


def test_markdown_has_the_same_cells():
    text = as_markdown(full())
    for grid in grids(full()):
        for row in (grid.head, *grid.rows):
            assert markdown_table(row, []).splitlines()[0] in text
    assert all(f"- {line}" in text for line in sentences(full()))
    assert "a\\|b" in text


def test_speed_of_an_interval():
    assert Speed.of(Interval(1.5, 1.2, 1.8)) == Speed(1.5, 1.2, 1.8, "faster")


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 us"), (0.9996, "1 ms"), (999.6, "1 s"), (0.0004, "0.4 us"), (61234, "61.2 s")],
)
def test_durations(milliseconds, text):
    assert duration(milliseconds) == text


def test_places():
    assert place(1, 2) == "batch 1, 2 threads"
