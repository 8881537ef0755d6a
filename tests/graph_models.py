"""Small models for the PT2E flow and the runtimes behind it."""

from __future__ import annotations

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


class ResNet(nn.Module):
    """A small residual network for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 17, 3, padding=1)
        self.body = nn.Sequential(Block(17), nn.MaxPool2d(2), Block(17))
        self.head = nn.Linear(17, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    """Tokens through two layers of torch's transformer, to seven values each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        layer = nn.TransformerEncoderLayer(24, 3, 33, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))
