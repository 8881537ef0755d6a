"""What the tests of layers share: quantizing one float layer, and what it must then compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qkit.algorithms import rtn
from qkit.nn import QUANTIZED, QLayer
from qkit.numerics import QTensor, dequantize
from qkit.spec import QSpec, parse


def _codes(layer: nn.Module, scheme: str | QSpec) -> QTensor:
    spec = parse(scheme).weight if isinstance(scheme, str) else scheme
    return rtn(QUANTIZED[type(layer)].rows(layer).detach().flatten(1), spec)


def _float_weight(layer: nn.Module, q: QTensor, dtype: torch.dtype) -> Tensor:
    """Written out, unlike the turning of qkit."""
    values = dequantize(q, dtype)
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return values.reshape(layer.weight.shape)
    weight = torch.empty(layer.weight.shape, dtype=dtype)
    per, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for out in range(layer.out_channels):
        g = out // per
        rows = values[out].reshape(inputs, *layer.kernel_size)
        weight[g * inputs : (g + 1) * inputs, out % per] = rows
    return weight


@pytest.fixture
def codes() -> Callable[[nn.Module, str | QSpec], QTensor]:
    """(float layer, scheme) -> its quantized weight as a matrix."""
    return _codes


@pytest.fixture
def quantized() -> Callable[[nn.Module, str | QSpec], QLayer]:
    """(float layer, scheme) -> the quantized layer."""
    return lambda layer, scheme: QUANTIZED[type(layer)].from_float(layer, _codes(layer, scheme))


@pytest.fixture
def float_weight() -> Callable[[nn.Module, QTensor, torch.dtype], Tensor]:
    """(float layer, codes, dtype) -> the values of the codes as that layer's weight."""
    return _float_weight


@pytest.fixture
def reference() -> Callable[[nn.Module, str | QSpec], nn.Module]:
    """(float layer, scheme) -> the float64 layer whose weight was rounded to ``scheme``."""

    def build(layer: nn.Module, scheme: str | QSpec) -> nn.Module:
        weight = _float_weight(layer, _codes(layer, scheme), torch.float64)
        new = copy.deepcopy(layer).double()
        new.weight = nn.Parameter(weight)
        return new

    return build


@pytest.fixture
def assert_rounded() -> Callable[[Tensor, Tensor], None]:
    """(result, exact float64 result): equal but for summation in fp32 and one rounding."""

    def check(got: Tensor, exact: Tensor) -> None:
        double = got.dtype == torch.float64
        rtol = 1e-12 if double else max(2 * torch.finfo(got.dtype).eps, 1e-5)
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-12 if double else 1e-5)

    return check
