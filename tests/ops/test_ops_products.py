"""Convolutions as products: torch's values, dtype and memory format; only where it is faster."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qkit import native
from qkit.nn import QUANTIZED
from qkit.numerics import choose_qparams, quantize
from qkit.ops import convolutions, products
from qkit.spec import parse

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.status()}")

LAYERS = {
    "1d": (lambda: nn.Conv1d(7, 33, 3, 2, padding=1), (2, 7, 31)),
    "1d, one output": (lambda: nn.Conv1d(7, 33, 3), (3, 7, 3)),
    "1d pointwise": (lambda: nn.Conv1d(31, 3, 1, 3), (1, 31, 9)),
    "2d": (lambda: nn.Conv2d(3, 7, (3, 1), (1, 2), (1, 0), (2, 1)), (2, 3, 7, 9)),
    "2d pointwise": (lambda: nn.Conv2d(31, 33, 1, bias=False), (2, 31, 3, 5)),
    "2d shortcut": (lambda: nn.Conv2d(31, 33, 1, 2), (2, 31, 7, 5)),
    "2d padded pointwise": (lambda: nn.Conv2d(7, 3, 1, padding=1), (1, 7, 3, 3)),
    "2d, one pixel": (lambda: nn.Conv2d(33, 7, 1), (3, 33, 1, 1)),
    "not batched": (lambda: nn.Conv2d(3, 7, 3), (3, 5, 5)),
}


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each convolution was a product; each one that can be is."""
    seen: list[bool] = []

    def product(*args):
        y = products.product(*args)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(products, "_faster", lambda *facts: True)
    monkeypatch.setattr(products, "VALUES_PER_PATCH", 1)
    monkeypatch.setattr(convolutions, "product", product)
    return seen


def quantized(layer: nn.Module, scheme: str) -> nn.Module:
    cls, spec = QUANTIZED[type(layer)], parse(scheme).weight
    rows = cls.rows(layer).detach().flatten(1)
    return cls.from_float(layer, quantize(rows, choose_qparams(rows, spec), spec)).eval()


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym", "w3a16"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_product_is_the_convolution(case, scheme, dtype, last, calls):
    make, shape = LAYERS[case]
    layer = make()
    new = quantized(layer, scheme).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    got = new(x)
    assert calls == [True] if len(shape) > len(layer.kernel_size) + 1 else calls[-1]
    exact = make().double()
    exact.weight.copy_(new.values(torch.float64).reshape(exact.weight.shape))
    exact.bias = None if new.bias is None else nn.Parameter(new.bias.double())
    want = exact(x.double())
    size = abs_(exact)(x.double().abs())
    # Each product and sum is rounded in fp32, the result once to the dtype.
    terms = layer.weight[0].numel() + 3
    bound = (terms * 2.0**-24 + torch.finfo(dtype).eps / 2) * size + torch.finfo(dtype).tiny
    assert ((got.double() - want).abs() <= bound).all()
    plain = torch.convolution(  # what a float layer gives, for its form
        x if len(shape) > len(layer.kernel_size) + 1 else x[None],
        exact.weight.to(dtype),
        None,
        *(layer.stride, layer.padding, layer.dilation, False),
        *((0,) * len(layer.kernel_size), 1),
    )
    if len(shape) == len(layer.kernel_size) + 1:
        plain = plain[0]
    assert (got.dtype, got.shape, got.stride()) == (dtype, plain.shape, plain.stride())


def abs_(layer: nn.Module) -> nn.Module:
    """The layer of the magnitudes."""
    for p in layer.parameters():
        p.data.abs_()
    return layer


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Conv3d(2, 3, 3)],
    ids=["groups", "transposed", "3d"],
)
def test_what_is_no_product(layer, calls):
    new = quantized(layer, "w8a16")
    new(torch.randn(1, layer.in_channels, *(3,) * len(layer.kernel_size)))
    assert calls == [False]


@pytest.mark.parametrize(
    ("layer", "patches", "want"),
    [
        ((2048, 512, 1), 392, True),  # the 1x1 convolutions of a ResNet-50's last stage
        ((64, 256, 1), 49, False),
        ((512, 512, 9), 49, True),  # the last stage of a ResNet-18, at batch 1 and 8
        ((512, 512, 9), 392, False),
        ((64, 64, 9), 1, True),
        ((64, 64, 9), 3136, False),
    ],
)
def test_only_where_it_is_faster(layer, patches, want):
    values = math.prod(layer)
    assert products._faster(patches, values, layer[2] == 1) is want


def test_the_dispatcher_takes_the_product_too(calls):
    layer = quantized(nn.Conv2d(7, 5, 3), "w8a16")
    x = torch.randn(1, 7, 5, 5, requires_grad=True)
    y = layer(x)
    assert calls == [True]
    y.sum().backward()
    want = torch.autograd.grad(
        torch.conv2d(x, layer.weight.reshape(5, 7, 3, 3), layer.bias).sum(), x
    )[0]
    torch.testing.assert_close(x.grad, want)
