"""The benchmarks run: each line is JSON, each contender has a figure; speed is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lines(name: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_numerics() -> None:
    head, *records = lines("numerics")
    assert head["machine"]["cpu"]
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("speed", "coding")}
    ours = {r["operation"] for r in by_kind["speed"] if r["contender"] == "qkit"}
    assert len(ours) == 6
    assert all(r["ms"]["median"] > 0 for r in by_kind["speed"])
    assert {"qkit huffman", "qkit ans"} <= {r["coder"] for r in by_kind["coding"]}
    quality = [r for r in records if r["kind"] == "quality"]
    assert {r["weight"] for r in quality} == {"Gaussian", "Laplacian", "MiniLM", "outlier columns"}


def test_layers() -> None:
    head, *records = lines("layers")
    assert head["machine"]["cpu"]
    for record in records:
        assert record["ms"]["median"] > 0
        assert record["sqnr_db"] is None or record["sqnr_db"] > 5
        if not record["scheme"].startswith("torch"):
            assert record["kernels"]


@pytest.mark.parametrize("name", ["numerics", "layers"])
def test_results_are_committed_with_what_made_them(name: str) -> None:
    first = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()[0]
    head = json.loads(first)
    assert head["machine"]["cpu"]
    assert head["versions"]["torch"]
    assert f"{name}.py" in head["command"]
