"""Model files, one artifact, and the command in this process for what needs no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Done, qkit, verify_in_this_process
from torch import nn


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models of every kind that the tests need."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()
    torch.save(net, folder / "net.pt")
    torch.save(net.state_dict(), folder / "state.pt")
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        state["5.weight"][3, 7] = value
        torch.save(state, folder / f"{name}.pt")
    torch.save(nn.Sequential(nn.LayerNorm(5), nn.ReLU()), folder / "norm.pt")
    torch.save(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), folder / "large.pt")
    (folder / "text.pt").write_text("not a model\n")
    (folder / "net_of_cli.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(\n"
        "        nn.Conv2d(3, 8, 3, padding=1),\n        nn.BatchNorm2d(8),\n"
        "        nn.ReLU(),\n        nn.AdaptiveAvgPool2d(4),\n        nn.Flatten(),\n"
        "        nn.Linear(128, 10),\n    )\n"
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    np.savez(folder / "x.npz", input=x.numpy())
    return folder


@pytest.fixture(scope="session")
def run(models: Path) -> Done:
    """``qkit quantize --json``; the artifact is ``models / "artifact"``."""
    return qkit(
        "quantize", models / "net.pt", "--calib", models / "x.npz", "-o", models / "artifact",
        "--json",
    )  # fmt: skip


@pytest.fixture(scope="session")
def artifact(models: Path, run: Done) -> Path:
    assert run.code == 0, run.err
    return models / "artifact"


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification in this process, for tests of something else: starting one takes seconds."""
    verify_in_this_process(monkeypatch)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process."""
    from qkit.cli import main as entry

    def call(*args: object) -> Done:
        capsys.readouterr()
        code = entry([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call
