"""Channels that a factor may pass through, and those that it may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkit.graph import capture
from qkit.graph.links import Link, Links
from qkit.graph.norms import merge


def links_of(model: nn.Module, *inputs: Tensor) -> Links:
    with torch.no_grad():
        module = capture(model.eval(), inputs, {}).module()
    merge(module)
    return Links(module)


def named(links: Links) -> list[tuple[str, list[str]]]:
    """The weights of makers and readers."""

    def weight(node: torch.fx.Node) -> str:
        place = 2 if "layer_norm" in str(node.target) else 1
        return str(node.args[place]).removesuffix("_weight")

    return [(weight(link.maker), [weight(n) for n in link.readers]) for link in links.all]


class Convolutions(nn.Module):
    """What factors pass: a norm, relu, depthwise, relu6, pools, a fork, and the way to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 12, 3, groups=6)
        self.left = nn.Conv2d(12, 5, 1, bias=False)
        self.right = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.depth(self.norm(self.a(x)).relu()), 2)
        x = nn.functional.relu6(x)
        x = self.left(x) + self.right(x)  # no factor passes a sum
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Chain(nn.Module):
    """A sum ends no link here: pools, a mean, flattening, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Linear(6, 7)
        self.c = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().mean((2, 3))
        return self.c(nn.functional.hardtanh(self.b(x), 0, 2))


class Norms(nn.Module):
    """A layer norm that linear layers read, one that a shortcut reads too, and a gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.up, self.down = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = self.second(x + self.q(y) * self.k(y))
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_convolutions() -> None:
    links = links_of(Convolutions(), torch.randn(4, 3, 9, 9))
    assert named(links) == [("a", ["depth"]), ("depth", ["left", "right"])]
    assert [link.ceiling for link in links.all] == [None, 6]
    assert [link.channels for link in links.all] == [6, 12]


def test_pools_and_linear_layers() -> None:
    links = links_of(Chain(), torch.randn(4, 3, 9, 9))
    assert named(links) == [("a", ["b"]), ("b", ["c"])]
    assert [link.ceiling for link in links.all] == [None, 2]


def test_layer_norms() -> None:
    links = links_of(Norms(), torch.randn(4, 5, 8))
    assert named(links) == [("first", ["q", "k"]), ("second", ["up"])]
    assert [link.apart for link in links.all] == [False, True]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu())


class Leaky(nn.Module):
    """Clipping from below, an output that is read, groups that mix channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.b(self.a(x))
        y = self.c(nn.functional.hardtanh(x, -1, 1))
        return y, self.a(y)


@pytest.mark.parametrize(("model", "shape"), [(Shared(), (3, 6)), (Leaky(), (3, 4, 5, 5))])
def test_what_no_factor_passes(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert links_of(model, torch.randn(shape)).all == []


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Convolutions(), (4, 3, 9, 9)), (Chain(), (4, 3, 9, 9)), (Norms(), (4, 5, 8))],
)
def test_factors_change_weights_and_nothing_else(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) / 8  # below all ceilings
    links = links_of(model, x)
    wanted = model(x)

    def ranges(link: Link) -> tuple[Tensor, Tensor]:
        return links.made(link), links.read(link)

    for link in links.all:
        made, read = ranges(link)
        factor = torch.rand(link.channels).double() + 0.5
        links.scale(link, factor)
        made = made if link.apart else made / factor
        for found, each in zip(ranges(link), (made, read * factor), strict=True):
            assert torch.allclose(found, each.float())
    links.module.graph.lint()
    links.module.recompile()
    error = (links.module(x) - wanted).abs().max() / wanted.abs().max()
    assert error <= 2.0**-18  # sums in fp32, of numbers that were scaled
    # The model itself is what it was.
    assert torch.equal(model(x), wanted)
