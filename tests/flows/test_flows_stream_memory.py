"""The peak memory of streaming does not grow with the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import python

ROOT = Path(__file__).resolve().parents[2]


def peak(folder: Path, gb: str, kind: str) -> int:
    script = ROOT / "benchmarks" / "streaming.py"
    done = python(script, "--gb", gb, "--shards", "2", "--kind", kind, "--folder", folder)
    assert done.code == 0, done.err
    line = done.json
    assert line["verified"] == "verified"
    assert line["artifact_bytes"] < 0.15 * line["source_bytes"]
    assert not folder.exists()
    return line["peak_rss_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_peak_memory(tmp_path: Path) -> None:
    small = peak(tmp_path / "s", "0.1", "safetensors")
    for kind in ("safetensors", "pt"):
        large = peak(tmp_path / kind, "1", kind)
        # The base is Python with torch; of a checkpoint ten times as large, nothing more stays.
        assert large < small + (100 << 20)
        assert large < 512 << 20  # as the README says
