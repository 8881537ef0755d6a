"""Facts about the machine: plain data, true where a test can tell."""

from __future__ import annotations

import json
import platform
import sys

import pytest
import torch

from qkit.report import machine as facts
from qkit.report import package_version, peak_rss_bytes, versions

# The package exports a function of the module's name.
module = sys.modules["qkit.report.machine"]


def test_machine_is_strict_json():
    data = facts()
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_machine_keys():
    data = facts()
    assert {"cpu", "arch", "isa", "cores", "threads", "memory_bytes", "system"} <= data.keys()
    assert data["cores"] >= 1
    assert data["threads"] == torch.get_num_threads()
    assert data["memory_bytes"] > 1 << 20
    assert data["arch"] == platform.machine()
    assert all(isinstance(name, str) for name in data["isa"])


@pytest.mark.parametrize(
    ("text", "cpu", "isa"),
    [
        (
            "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma avx512_vnni\n",
            "Some CPU @ 2 GHz",
            3,
        ),
        ("Features\t: fp asimd asimddp i8mm sve\n", None, 4),
        ("nonsense without a colon\n", None, 0),
        ("", None, 0),
    ],
    ids=["x86", "arm", "nonsense", "empty"],
)
def test_cpuinfo(text, cpu, isa, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    data = facts()
    assert len(data["isa"]) == isa
    assert isinstance(data["cpu"], str)
    assert cpu is None or data["cpu"] == cpu


def test_without_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "missing")
    assert facts()["isa"] == []


def test_versions():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__ == package_version("torch")
    assert {"qkit", "numpy", "safetensors"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def test_an_absent_package_has_no_version():
    assert package_version("no-such-package-anywhere") is None


def test_peak_memory_is_in_bytes_and_never_falls():
    before = peak_rss_bytes()
    block = b"x" * (64 << 20)
    after = peak_rss_bytes()
    del block
    assert before > 1 << 20
    assert after >= before
    # Linux counts pages in batches for each processor, so that figures are off by some.
    assert peak_rss_bytes() >= after - (1 << 20)
