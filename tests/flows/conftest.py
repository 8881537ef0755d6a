"""What the tests of flows share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command import verify_in_this_process
from torch import nn


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification in this process, for tests of something else: starting one takes seconds."""
    verify_in_this_process(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the commands of the tests run: another number of threads may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Every kind of row: quantized, normalisation, embedding, a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.body = nn.ModuleDict({"fc1": nn.Linear(96, 33), "fc2": nn.Linear(33, 7)})
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.norm(self.conv(x)).relu()).flatten(1)
        return self.body["fc2"](self.body["fc1"](x).relu()) * self.scale


@pytest.fixture
def net_class() -> type[nn.Module]:
    return Net


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def bytes_of() -> Callable[[Path], dict[str, bytes]]:
    """The files of a folder that must not differ between two equal runs."""
    return lambda folder: {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name != "report.json"
    }
