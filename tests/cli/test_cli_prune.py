"""``qkit prune``: in a process of its own, and refusals at once."""

from __future__ import annotations

import pytest
import torch
from command import names, qkit
from torch import nn


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Two convolutions, so that there are channels inside."""
    folder = tmp_path_factory.mktemp("prune")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    torch.save(net.eval(), folder / "net.pt")
    torch.save(net.state_dict(), folder / "state.pt")
    (folder / "loss_of_cli.py").write_text("def loss(model):\n    return 0\n")
    return folder


@pytest.fixture(scope="module")
def done(folder, models):
    return qkit(
        "prune", folder / "net.pt", "--inputs", models / "x.npz", "-o", folder / "out", "--json"
    )


def test_the_report(done, folder):
    assert done.code == 0, done.err
    report = done.json
    assert report["ratio"]["macs"] <= 0.5
    assert report["verification"]["status"] == "verified"
    assert report["verification"]["fresh_process"]
    assert [check["way"] for check in report["verification"]["checks"]] == ["module", "program"]
    assert report["size_bytes"]["artifact"] < report["size_bytes"]["source"]
    assert {"before", "after", "speedup"} <= report["latency_ms"].keys()
    assert {row["name"] for row in report["groups"]} == {"0", "2"}
    assert (folder / "out" / "report.json").is_file()


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch copies its own programs so
def test_the_artifact_is_a_model_like_any_other(done, folder, models, main):
    out = folder / "out"
    assert main("inspect", out, "--json").json["parameters"] == done.json["after"]["params"]
    assert main("compare", folder / "net.pt", out, "--calib", models / "x.npz").code == 0
    quantized = qkit("quantize", out, "-o", folder / "both", "--json")
    assert quantized.code == 0, quantized.err
    assert quantized.json["coverage"]["layers_quantized"] == 3
    assert quantized.json["source"]["kind"] == "artifact"
    for data in ((), ("--inputs", models / "x.npz")):  # by name, which its program does not know
        again = main("prune", out, "--amount", "0.2", "--dry-run", "--json", *data)
        assert again.code == 0, again.err
        assert again.json["before"]["macs"] == done.json["after"]["macs"]


def test_the_table(folder, models, main):
    done = main("prune", folder / "net.pt", "--inputs", models / "x.npz", "--dry-run")
    assert done.code == 0, done.err
    for word in ("multiply-adds", "parameters", "latency", "dry run"):
        assert word in done.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["net.pt", "--amount", "1.0"], 2, "below 1"),
        (["net.pt", "--unit", "flops"], 2, "macs"),
        (["net.pt", "--importance", "taylor"], 2, "--loss"),
        (["net.pt", "--loss", "loss_of_cli:nothing"], 2, "nothing"),
        (["net.pt", "--ignore", "nothing"], 2, "no layer is called so"),
        (["net.pt", "--ignore", "*"], 5, "nothing can be removed"),
        (["net.pt", "--amount", "0.9999"], 6, "not enough"),
        (["state.pt"], 2, "--model"),
        (["missing.pt"], 3, "missing.pt"),
    ],
)
def test_refusals_leave_nothing(folder, main, monkeypatch, options, code, words, done):
    monkeypatch.chdir(folder)
    before = names(folder)
    run = main("prune", *options, "--input", "2x3x8x8", "-o", "new")
    assert run.code == code, run.err
    assert words in run.error
    assert [n for n in names(folder) if n != "__pycache__"] == [
        n for n in before if n != "__pycache__"
    ]
