"""The same model gives the same bytes: in another folder, process and under another hash seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import files, qkit
from torch import nn

import qkit as library

SCHEME = "w4a16-g32-asym"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a model, and two runs of the command on it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(252, 10)
    ).eval()
    torch.save(model, folder / "net.pt")
    x = torch.randn(2, 3, 8, 8)
    np.savez(folder / "x.npz", input=x.numpy())
    other = folder / "another folder" / "größe"
    options = ["--scheme", SCHEME, "--calib", folder / "x.npz", "-q"]
    for out, seed in ((folder / "a", "1"), (other / "b", "2")):
        done = qkit(
            "quantize", folder / "net.pt", "-o", out, *options, env={"PYTHONHASHSEED": seed}
        )
        assert (done.code, done.out, done.err) == (0, "", "")
    return folder, files(folder / "a"), files(other / "b")


def test_two_runs_of_the_command(runs):
    _, a, b = runs
    assert a.keys() == b.keys()
    assert len(a) == 5
    assert [name for name in a if a[name] != b[name]] == ["report.json"]


def test_the_library_writes_what_the_command_writes(runs, tmp_path, same_process, one_thread):
    folder, a, _ = runs
    model = torch.load(folder / "net.pt", weights_only=False)
    inputs = {"input": torch.from_numpy(np.load(folder / "x.npz")["input"])}
    qmodel, report = library.quantize(model, SCHEME, calib=folder / "x.npz", latency=False)
    library.save(qmodel, tmp_path / "out", report=report, inputs=inputs)
    c = files(tmp_path / "out")
    assert a.keys() == c.keys()
    # The table differs: the library was given a model, not the file that it came from.
    assert {name for name in a if a[name] != c[name]} == {"report.json", "qkit.json"}


def test_nothing_of_the_machine_is_in_the_artifact(runs, tmp_path):
    for name, data in runs[2].items():
        if name != "report.json":
            assert "größe".encode() not in data
            assert str(tmp_path.parents[1]).encode() not in data, name


def test_saving_twice_in_one_process(net, x, tmp_path, same_process, bytes_of):
    qmodel, report = library.quantize(net, "w8a16", inputs=x, latency=False)
    for name in ("a", "b"):
        library.save(qmodel, tmp_path / name, inputs=x, report=report)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
