"""Models for the tests of the graph."""

from __future__ import annotations

import pytest
import torch
from graph_models import Block
from torch import Tensor, nn


class Residual(nn.Module):
    """A convolutional network with a shortcut, a pool and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3)
        self.block = Block(7)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(7 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.block(self.stem(x).relu())).flatten(1))


@pytest.fixture
def residual() -> nn.Module:
    return Residual().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(33, 3, 9, 9)
