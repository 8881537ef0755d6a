"""A report is plain strict JSON with the promised keys, and comes back as it was."""

from __future__ import annotations

import json
import math

import pytest

from qkit.errors import InputError
from qkit.report import LayerRow, Report, coverage, machine, versions

# What every report must answer.
REQUIRED = {
    "scheme",
    "target",
    "layers",
    "coverage",
    "size_bytes",
    "error",
    "latency_ms",
    "kernels",
    "verification",
    "peak_rss_bytes",
    "seconds",
    "versions",
    "machine",
}

ROWS = [
    LayerRow("fc", "Linear", (3, 4), 15, "w8a16", None, 16.0, 42.123, None),
    LayerRow("tied", "Linear", (3, 4), 3, "w8a16", None, 16.0, 42.123, "tied to fc"),
    LayerRow("norm", "LayerNorm", (4,), 8, reason="normalisation stays in float"),
    LayerRow("lstm", "LSTM", (), 6, reason="no quantized form of LSTM yet"),
]


def full() -> Report:
    return Report(
        "w8a16",
        "w8a16: weights int8",
        "torch",
        layers=ROWS,
        coverage=coverage(ROWS),
        size_bytes={"source": 128, "artifact": 60, "ratio": 0.46875},
        error={"sqnr_db": None, "cosine": 1.0, "max_abs": 0.0},
        kernels={"qkit::linear[reference]": 2},
        remarks=["größer als gedacht"],
        artifact="out",
        peak_rss_bytes=1 << 30,
        seconds=1.5,
        versions=versions(),
        machine=machine(),
    )


def reports() -> list:
    return [pytest.param(full(), id="full"), pytest.param(Report("s", "l", "torch"), id="empty")]


@pytest.mark.parametrize("report", reports())
def test_json_round_trip(report):
    again = Report.from_json(json.loads(report.dumps()))
    assert again == report
    assert again.dumps() == report.dumps()
    assert all(isinstance(row, LayerRow) for row in again.layers)
    assert all(isinstance(row.shape, tuple) for row in again.layers)


@pytest.mark.parametrize("report", reports())
def test_required_keys(report):
    data = report.to_json()
    assert data.keys() >= REQUIRED
    assert isinstance(data["layers"], list)
    assert isinstance(data["coverage"], dict)


def test_keys_of_a_layer():
    row = full().to_json()["layers"][0]
    assert {"name", "kind", "shape", "parameters", "scheme", "reason", "sqnr_db"} <= row.keys()


def test_every_layer_is_quantized_or_has_a_reason():
    for row in full().to_json()["layers"]:
        assert (row["scheme"] is None) == bool(row["reason"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_not_json(value):
    report = full()
    report.seconds = value
    with pytest.raises(ValueError, match=r"(?i)JSON"):
        report.dumps()


def test_text_ends_with_one_newline():
    text = full().dumps()
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")


def test_to_json_is_a_copy():
    report = full()
    report.to_json()["coverage"]["parameters"] = -1
    assert report.coverage["parameters"] == 32


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_an_unknown_format_is_refused(version):
    with pytest.raises(InputError, match="format"):
        Report.from_json(full().to_json() | {"format": version})


# Coverage


def test_coverage_counts_parameters_and_layers():
    assert coverage(ROWS) == {
        "parameters": 32,
        "quantized_parameters": 18,
        "fraction": 0.5625,
        "layers_quantized": 2,
        "layers_left": 2,
    }


@pytest.mark.parametrize(
    ("rows", "fraction", "done", "left"),
    [
        ([], 0.0, 0, 0),
        (ROWS[:1], 1.0, 1, 0),
        (ROWS[2:], 0.0, 0, 2),
        ([LayerRow("empty", "Linear", (0, 3), 0, reason="its weight is empty")], 0.0, 0, 1),
    ],
    ids=["none", "all", "nothing", "no-parameters"],
)
def test_coverage_of_extremes(rows, fraction, done, left):
    got = coverage(rows)
    assert (got["fraction"], got["layers_quantized"], got["layers_left"]) == (fraction, done, left)
