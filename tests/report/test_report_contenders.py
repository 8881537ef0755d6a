"""``qkit bench`` of real models in six forms: measured by one command, and shown by its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browsing import opened, whole

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["float", "float again", "w8a16", "w4a16-g32"]
NAMES += ["int8 inductor", "int8 xnnpack", "int8 onnx"]
# The share of digits told rightly, of 97 to 98 %, and the cosine of embeddings.
LEAST = {"digits": 95.0, "MiniLM": 0.97}
CHARTS = 6  # of one batch and one number of threads

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=LEAST)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def records(case: str, reports: Path) -> dict[str, dict[str, Any]]:
    """The lines of one short run, by contender."""
    script = str(ROOT / "benchmarks" / "contenders.py")
    options = ["--case", case, "--runs=1", "--tries=1", "--seconds=0.05", "--reports", str(reports)]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *found = map(json.loads, done.stdout.splitlines())
    assert head["machine"]["cpu"]
    return {record["contender"]: record for record in found}


def test_all_are_measured(case, records):
    assert list(records) == NAMES
    for record in records.values():
        assert "failure" not in record
        assert record["ci"][0] <= record["ms"] <= record["ci"][1]
        assert record["metric"] >= LEAST[case]
    assert "sqnr_db" not in records["float again"]  # no error at all
    # Rounding to 8 bits leaves 20 dB and more of a CNN, to 4 bits 10. MiniLM's states at padding,
    # which nothing reads, differ freely, so that its embeddings are judged above; outputs that have
    # nothing to do with the float model's are at 0 dB and less.
    for name in NAMES[2:]:
        least = 0 if case == "MiniLM" else 10 if "w4" in name else 20
        assert records[name]["sqnr_db"] > least, name
    assert records["w4a16-g32"]["bytes"] < records["w8a16"]["bytes"] < records["float"]["bytes"]


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1400, "light")])
def test_the_report_is_whole(browser, case, reports, width, scheme):
    whole(browser, reports / f"{case}.html", width, scheme, charts_at_least=CHARTS)


@pytest.mark.usefixtures("records")
def test_the_report_shows_every_contender(browser, case, reports):
    seen = opened(browser, reports / f"{case}.html")
    text = seen.tab.inner_text("main")
    assert all(name in text for name in NAMES)
    seen.tab.context.close()
