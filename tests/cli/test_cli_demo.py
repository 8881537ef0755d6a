"""The demo does what the README promises."""

from __future__ import annotations

import pytest
from command import files, names, qkit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
def test_demo(scheme, tmp_path):
    done = qkit("demo", "--json", "--scheme", scheme, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    report = done.json
    accuracy = report["metrics"]["accuracy %"]
    assert accuracy["float"] > 95
    assert abs(accuracy["float"] - accuracy[scheme]) <= (0.3 if scheme == "w8a16" else 2)
    assert report["size_bytes"]["ratio"] <= (0.27 if scheme == "w8a16" else 0.2)
    assert report["verification"]["status"] == "verified"
    assert report["verification"]["level"] == "model"
    out = tmp_path / "qkit-demo" / f"digits-{scheme}"
    assert report["size_bytes"]["folder"] == sum(len(data) for data in files(out).values())
    assert names(tmp_path / "qkit-demo") == sorted(["digits.pt", "digits-calib.npz", out.name])


def test_the_demo_talks_and_runs_twice(tmp_path):
    for _ in range(2):
        done = qkit("demo", "-o", tmp_path / "my demo")
        assert done.code == 0, done.err
        assert "accuracy %" in done.out
        assert "$ qkit quantize" in done.err
