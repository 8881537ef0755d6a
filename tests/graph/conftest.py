"""Models for the tests of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions around which the input goes; one ReLU is used twice."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


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
