"""QLinear computes what nn.Linear does with the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkit.errors import QkitError
from qkit.nn import QLinear

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    f"w{bits}a16-{blocks}-{form}"
    for bits in range(1, 9)
    for blocks in ("channel", "tensor", "g8", "g64")
    for form in ("sym", "asym")
    if (bits, form) != (1, "sym")
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_equals_the_float_layer(scheme, dtype, quantized, reference, assert_rounded):
    layer = nn.Linear(33, 31).to(dtype)
    x = torch.randn(5, 33).to(dtype)
    y = quantized(layer, scheme)(x)
    assert y.dtype == dtype
    assert_rounded(y, reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8", "w3a16-g8-asym"])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(scheme, lead, quantized, reference, assert_rounded):
    layer, x = nn.Linear(17, 3), torch.randn(*lead, 17)
    y = quantized(layer, scheme)(x)
    assert y.shape == (*lead, 3)
    assert_rounded(y, reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 5)], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16-asym", "w5a16-tensor", "w4a16-g3", "w1a16-channel"])
def test_any_size(size, scheme, quantized, reference, assert_rounded):
    layer, x = nn.Linear(*size), torch.randn(4, size[0])
    assert_rounded(quantized(layer, scheme)(x), reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8"])
def test_inputs_need_not_be_contiguous(scheme, quantized):
    layer, x = quantized(nn.Linear(17, 3), scheme), torch.randn(17, 5).t()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_geometry_is_that_of_the_float_layer(quantized):
    layer = quantized(nn.Linear(33, 31), "w4a16-g8")
    assert isinstance(layer, QLinear)
    assert (layer.in_features, layer.out_features) == (33, 31)
    assert layer.weight_size == (31, 33)


@pytest.mark.parametrize("features", [1, 11, 32, 34, 66])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-tensor", "w4a16-channel", "w4a16-g8"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_an_input_of_another_size_is_refused(features, scheme, bias, quantized):
    layer = quantized(nn.Linear(33, 5, bias=bias), scheme)
    with pytest.raises((RuntimeError, QkitError)):
        layer(torch.randn(2, features))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (4,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (17, 3), (3, 17)], ids=str)
def test_input_vectors_are_what_the_weight_is_multiplied_with(size, lead):
    layer, x = nn.Linear(*size, bias=False).double(), torch.randn(*lead, size[0]).double()
    (vectors,) = QLinear.input_vectors(layer, x)
    got = vectors @ layer.weight.t()
    torch.testing.assert_close(got, layer(x).reshape(-1, size[1]))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8"])
def test_an_integer_input_is_refused(scheme, quantized):
    with pytest.raises((RuntimeError, QkitError), match=r"(?i)float"):
        quantized(nn.Linear(33, 5), scheme)(torch.ones(2, 33, dtype=torch.int64))
