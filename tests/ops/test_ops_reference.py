"""The operators compute what they say, on every stored form of a weight.

The tolerance of one output value y = sum of K products (and a bias) is derived, not tuned: the
decoded weight is rounded once, each product once and each of K sums once, in any order, so

    |error| <= (K + 3) * u * sum|x||w|   +   u_out * |y|   +   half of the least denormal

with u = 2^-24 (2^-53 for fp64 inputs) and u_out the same of the output's dtype. That is the bound
of the reference, which runs here for all operators; those of the kernels are in test_ops_native.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import conv2d_oracle, dequantize_oracle, linear_oracle
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qkit import native, ops
from qkit.errors import QkitError
from qkit.numerics import QTensor, choose_qparams, dequantize, quantize
from qkit.ops import convolutions, reference
from qkit.packing import pack, to_tensors
from qkit.spec import BF16, FP16, PerGroup, parse

SCHEMES = [
    *(f"w{bits}a16-{kind}" for bits in range(2, 9) for kind in ("channel", "g8")),
    *(f"w{bits}a16-{kind}-asym" for bits in range(1, 9) for kind in ("channel", "g5")),
    "w8a16-tensor",
    "w8a16-tensor-asym",
    "w4a16-tensor",
    "w3a16-tensor-asym",
    "w4a16-g1000",
]
FEW = ["w8a16", "w8a16-g8-asym", "w4a16-g8", "w4a16-channel-asym", "w3a16-tensor-asym"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(scheme: str, *shape: int, scale=None) -> tuple[QTensor, tuple]:
    """A random weight, and its (weight, scale, zero point) and (bits, group) for an operator."""
    spec = parse(scheme).weight
    spec = spec if scale is None else replace(spec, scale=scale)
    matrix = randn(*shape, seed=1).reshape(shape[0], math.prod(shape[1:]))
    q = quantize(matrix, choose_qparams(matrix, spec), spec)
    tensors = to_tensors(q, shape)
    weight = tensors["weight" if spec.format.bits == 8 else "weight_packed"]
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    zero_point = tensors.get("weight_zero_point")
    return q, ((weight, tensors["weight_scale"], zero_point), (spec.format.bits, group))


def linear(x, args, bias=None):
    weight, how = args
    return ops.linear(x, *weight, bias, *how)


def conv2d(x, args, kernel, bias=None, stride=1, padding=0, dilation=1, groups=1):
    weight, how = args
    pairs = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    return ops.conv2d(x, *weight, bias, *how, kernel, *pairs, groups)


def exact_weight(q: QTensor) -> np.ndarray:
    zero = q.qparams.zero_point
    return dequantize_oracle(
        q.codes.numpy(),
        q.qparams.scale.double().numpy(),
        None if zero is None else zero.numpy(),
        q.spec.granularity.block_shape(q.shape),
    )


def assert_within_rounding(y: torch.Tensor, want: np.ndarray, size: np.ndarray, terms: int) -> None:
    """``y`` is ``want`` up to the bound at the top of this file; ``size`` is sum|x||w|."""
    assert y.shape == want.shape
    info = torch.finfo(y.dtype)
    work = 2.0**-53 if y.dtype == torch.float64 else 2.0**-24
    inside = 1.01 * (terms + 3) * work * size
    bound = inside + info.eps / 2 * (np.abs(want) + inside) + info.smallest_normal * info.eps / 2
    error = np.abs(y.double().numpy() - want)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


# ---------------------------------------------------------------- linear


@dtypes
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_equals_the_oracle(scheme, dtype):
    q, args = stored(scheme, 7, 33)
    x, bias = randn(3, 33, dtype=dtype), randn(7, seed=2, dtype=dtype)
    want, size = linear_oracle(x.double().numpy(), exact_weight(q), bias.double().numpy())
    y = linear(x, args, bias)
    assert y.dtype == dtype
    assert_within_rounding(y, want, size, 33)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("k", [1, 3, 31, 32, 65])
@pytest.mark.parametrize("scheme", FEW)
def test_linear_of_odd_sizes_without_bias(scheme, k, n):
    q, args = stored(scheme, n, k)
    x = randn(2, k)
    want, size = linear_oracle(x.double().numpy(), exact_weight(q), None)
    assert_within_rounding(linear(x, args), want, size, k)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_linear_takes_any_leading_dimensions(scheme, shape):
    q, args = stored(scheme, 5, 9)
    x = randn(*shape, 9)
    y = linear(x, args)
    assert y.shape == (*shape, 5)
    rows = math.prod(shape)
    want, size = linear_oracle(x.double().numpy().reshape(rows, 9), exact_weight(q), None)
    assert_within_rounding(y.reshape(rows, 5), want, size, 9)


@pytest.mark.parametrize("scale", [FP16, BF16], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_linear_with_narrow_scales(scheme, scale):
    q, args = stored(scheme, 5, 9, scale=scale)
    x = randn(3, 9)
    want, size = linear_oracle(x.double().numpy(), exact_weight(q), None)
    assert_within_rounding(linear(x, args), want, size, 9)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@dtypes
def test_linear_bias_of_another_dtype(dtype, bias_dtype):
    q, args = stored("w4a16-g8", 5, 9)
    x, bias = randn(3, 9, dtype=dtype), randn(5, seed=2, dtype=bias_dtype)
    want, size = linear_oracle(x.double().numpy(), exact_weight(q), bias.double().numpy())
    y = linear(x, args, bias)
    assert y.dtype == dtype
    assert_within_rounding(y, want, size, 9)


def test_linear_takes_a_non_contiguous_input():
    _, args = stored("w4a16-g8", 5, 9)
    x = randn(9, 6).t()[::2]
    assert torch.equal(linear(x, args), linear(x.contiguous(), args))


def test_linear_without_inputs_or_outputs():
    """nn.Linear(0, n) and nn.Linear(n, 0) exist."""
    zero = torch.empty(4, 0, dtype=torch.int8), torch.empty(4, 0), None
    assert torch.equal(ops.linear(torch.ones(2, 0), *zero, torch.ones(4), 8, 0), torch.ones(2, 4))
    none = torch.empty(0, 5, dtype=torch.int8), torch.empty(0, 1), None
    assert ops.linear(torch.ones(2, 5), *none, None, 8, 0).shape == (2, 0)


# ---------------------------------------------------------------- conv2d

# (channels in, channels out, kernel, stride, padding, dilation, groups)
CONVS = {
    "plain": (3, 4, (3, 3), 1, 0, 1, 1),
    "1x1": (5, 3, (1, 1), 1, 0, 1, 1),
    "strided": (3, 4, (3, 3), 2, 1, 1, 1),
    "uneven": (2, 3, (3, 2), (2, 1), (0, 1), (1, 2), 1),
    "dilated": (3, 4, (3, 3), 1, 2, 2, 1),
    "grouped": (4, 6, (3, 3), 1, 1, 1, 2),
    "depthwise": (5, 5, (3, 3), 1, 1, 1, 5),
    "depthwise-times-2": (3, 6, (3, 3), 2, 1, 1, 3),
}
convs = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


def conv_case(conv, scheme, dtype=torch.float32):
    """Input, stored weight, bias, geometry, and the oracle's (result, size)."""
    c_in, c_out, kernel, *geometry, groups = conv
    q, args = stored(scheme, c_out, c_in // groups, *kernel)
    x, bias = randn(2, c_in, 7, 6, dtype=dtype), randn(c_out, seed=2, dtype=dtype)
    weight = exact_weight(q).reshape(c_out, c_in // groups, *kernel)
    pairs = [(n, n) if isinstance(n, int) else n for n in geometry]
    want = conv2d_oracle(x.double().numpy(), weight, bias.double().numpy(), *pairs, groups)
    return x, args, bias, (*geometry, groups), want


@convs
@pytest.mark.parametrize("scheme", FEW)
def test_conv2d_equals_the_oracle(scheme, conv):
    x, args, bias, geometry, (want, size) = conv_case(conv, scheme)
    y = conv2d(x, args, conv[2], bias, *geometry)
    assert_within_rounding(y, want, size, math.prod(conv[2]) * conv[0] // conv[-1])


@dtypes
@pytest.mark.parametrize("conv", ["strided", "grouped"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_conv2d_of_every_width_and_dtype(bits, conv, dtype):
    conv = CONVS[conv]
    x, args, bias, geometry, (want, size) = conv_case(conv, f"w{bits}a16-g8-asym", dtype)
    y = conv2d(x, args, conv[2], bias, *geometry)
    assert y.dtype == dtype
    assert_within_rounding(y, want, size, 9 * conv[0] // conv[-1])


@convs
def test_conv2d_keeps_the_memory_format_of_torch(conv):
    x, args, bias, geometry, (want, size) = conv_case(conv, "w4a16-g8")
    x = x.to(memory_format=torch.channels_last)
    y = conv2d(x, args, conv[2], bias, *geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within_rounding(y, want, size, math.prod(conv[2]) * conv[0] // conv[-1])


def test_conv2d_of_an_empty_batch():
    _, args = stored("w4a16-g8", 4, 3, 3, 3)
    assert conv2d(torch.empty(0, 3, 7, 6), args, (3, 3)).shape == (0, 4, 5, 4)


def test_conv2d_of_one_image_without_a_batch_as_nn_conv2d():
    q, args = stored("w4a16-g8", 4, 3, 3, 3)
    x, bias = randn(3, 7, 6).requires_grad_(), torch.zeros(4, requires_grad=True)
    y = conv2d(x, args, (3, 3), bias, padding=1)
    want = F.conv2d(x, dequantize(q).reshape(4, 3, 3, 3), bias, padding=1)
    torch.testing.assert_close(y, want)
    for got, expected in zip(
        torch.autograd.grad(y.sum(), (x, bias)),
        torch.autograd.grad(want.sum(), (x, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------- dequantize and tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_is_exact(scheme, dtype):
    q, (weight, how) = stored(scheme, 7, 33)
    got = ops.dequantize(*weight, *how, 33, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.numpy(), exact_weight(q).astype(got.numpy().dtype))


@pytest.mark.parametrize("tile", [1, 20, 33, 70, 99, 10_000])
@pytest.mark.parametrize("scheme", FEW)
def test_tiles_do_not_change_linear(scheme, tile, monkeypatch):
    """33 columns: less than a row, one row, two and a bit, all rows."""
    q, args = stored(scheme, 7, 33)
    x, bias = randn(3, 33), randn(7, seed=2)
    want, size = linear_oracle(x.double().numpy(), exact_weight(q), bias.double().numpy())
    monkeypatch.setattr(reference, "TILE_VALUES", tile)
    assert_within_rounding(linear(x, args, bias), want, size, 33)


@convs
@pytest.mark.parametrize("tile", [1, 60])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_tiles_do_not_change_conv2d(memory_format, tile, conv, monkeypatch):
    x, args, bias, geometry, (want, size) = conv_case(conv, "w3a16-tensor-asym")
    x = x.to(memory_format=memory_format)
    monkeypatch.setattr(reference, "TILE_VALUES", tile)
    y = conv2d(x, args, conv[2], bias, *geometry)
    assert y.is_contiguous(memory_format=memory_format)
    assert_within_rounding(y, want, size, math.prod(conv[2]) * conv[0] // conv[-1])


class LargestFloat(TorchDispatchMode):
    """Remembers the most values in any float tensor that an operator returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.values = max(self.values, tensor.numel())
        return out


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-tensor", "w4a16-g32-asym", "w3a16-g32"])
def test_a_large_weight_is_never_a_float_matrix(scheme, monkeypatch):
    rows, columns, tile = 256, 128, 4096
    _, (weight, how) = stored(scheme, rows, columns)
    monkeypatch.setattr(reference, "TILE_VALUES", tile)
    with LargestFloat() as largest:
        reference.linear(randn(2, columns), *weight, None, *how)
    assert largest.values == tile < rows * columns


def test_a_large_convolution_is_never_a_float_matrix(monkeypatch):
    _, (weight, how) = stored("w4a16-g8", 64, 16, 3, 3)
    monkeypatch.setattr(reference, "TILE_VALUES", 1440)
    with LargestFloat() as largest:
        one = [1, 1]
        convolutions.conv2d(randn(1, 16, 4, 4), *weight, None, *how, [3, 3], one, one, one, 1)
    assert largest.values == 1440


# ---------------------------------------------------------------- gradients


def assert_same_gradients(got, want, inputs, rtol=None, atol=None):
    """Of a loss that is not linear in the output."""
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_linear_gradients_equal_those_of_the_float_layer(scheme, shape):
    q, args = stored(scheme, 5, 9)
    x, bias = randn(*shape).requires_grad_(), randn(5, seed=2).requires_grad_()
    assert_same_gradients(
        linear(x, args, bias), F.linear(x, dequantize(q), bias), (x, bias), rtol=1e-5, atol=1e-5
    )


@convs
def test_conv2d_gradients_equal_those_of_the_float_layer(conv):
    x, args, bias, geometry, _ = conv_case(conv, "w4a16-g8-asym")
    x, bias = x.requires_grad_(), bias.requires_grad_()
    (weight, how), shape = args, (conv[1], conv[0] // conv[-1], *conv[2])
    floats = ops.dequantize(*weight, *how, math.prod(shape[1:]), torch.float32).reshape(shape)
    want = F.conv2d(x, floats, bias, *geometry)
    got = conv2d(x, args, conv[2], bias, *geometry)
    assert_same_gradients(got, want, (x, bias), rtol=1e-5, atol=1e-4)


def test_gradcheck_of_linear():
    _, args = stored("w4a16-g8-asym", 5, 9)
    x = randn(3, 9, dtype=torch.float64).requires_grad_()
    bias = randn(5, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: linear(x, args, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: linear(x, args).square(), (x,))


@pytest.mark.parametrize("conv", ["uneven", "depthwise-times-2"])
def test_gradcheck_of_conv2d(conv):
    conv = CONVS[conv]
    x, args, bias, geometry, _ = conv_case(conv, "w3a16-g8", torch.float64)
    inputs = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: conv2d(x, args, conv[2], b, *geometry), inputs, fast_mode=True
    )


@dtypes
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    _, args = stored("w8a16", 5, 9)
    x, bias = randn(3, 9, dtype=dtype).requires_grad_(), randn(5, seed=2).requires_grad_()
    linear(x, args, bias).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_weights_get_no_gradient(op):
    shape = (5, 9) if op == "linear" else (5, 1, 3, 3)
    _, ((weight, scale, zero), how) = stored("w4a16-g4-asym", *shape)
    args, scale = ((weight, scale.requires_grad_(), zero), how), scale
    x = randn(3, 9) if op == "linear" else randn(3, 1, 4, 4)
    x.requires_grad_()
    (linear(x, args) if op == "linear" else conv2d(x, args, (3, 3))).sum().backward()
    assert x.grad is not None
    assert scale.grad is None


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_the_gradients_that_are_asked_for(wanted):
    _, args = stored("w8a16", 5, 9)
    x, bias = randn(3, 9), randn(5, seed=2)
    asked, other = (x, bias) if wanted == "x" else (bias, x)
    asked.requires_grad_()
    linear(x, args, bias).sum().backward()
    assert asked.grad is not None
    assert other.grad is None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_x_must_be_float(dtype):
    _, args = stored("w8a16", 5, 9)
    with pytest.raises(RuntimeError, match=r"qkit::linear: x must be a float tensor, got torch\."):
        linear(torch.ones(2, 9, dtype=dtype), args)
    _, args = stored("w8a16", 4, 1, 3, 3)
    with pytest.raises(RuntimeError, match=r"qkit::convolution: x must be a float tensor"):
        conv2d(torch.ones(1, 1, 4, 4, dtype=dtype), args, (3, 3))


# Below 8 bits an operator sees whole words only; a K of as many words is the layer's to refuse.
WRONG_K = [
    *((scheme, k) for scheme in ("w8a16", "w8a16-tensor") for k in (3, 8, 10, 12, 24)),
    *((scheme, k) for scheme in ("w4a16-channel", "w4a16-tensor") for k in (10, 12, 24)),
]
WRONG_CHANNELS = [
    *((scheme, c) for scheme in ("w8a16", "w8a16-tensor") for c in (4, 16, 32)),
    *(("w4a16-channel", c) for c in (16, 32)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("scheme", "k"), WRONG_K)
def test_linear_with_a_wrong_number_of_features_is_refused(scheme, k, device):
    """The weight is [4, 6]: to 24 features it could be one row, to 3 features eight."""
    _, ((weight, scale, zero), how) = stored(scheme, 4, 6)
    args = (weight.to(device), scale.to(device), zero), how
    with pytest.raises((RuntimeError, QkitError), match=f"{k} (features|packed values)"):
        linear(torch.ones(2, k, device=device), args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("scheme", "channels"), WRONG_CHANNELS)
def test_conv2d_with_wrong_channels_is_refused(scheme, channels, device):
    """The weight is [4, 8, 1, 1]: to 4 channels it could be eight rows, to 32 a single one."""
    _, ((weight, scale, zero), how) = stored(scheme, 4, 8, 1, 1)
    args = (weight.to(device), scale.to(device), zero), how
    with pytest.raises((RuntimeError, QkitError)):
        conv2d(torch.ones(1, channels, 3, 3, device=device), args, (1, 1))


@pytest.mark.parametrize("shape", [(4, 9), (3, 1), (1, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8"])
def test_scales_that_do_not_fit_the_weight_are_refused(scheme, shape):
    _, ((weight, _, zero), how) = stored(scheme, 4, 15)
    with pytest.raises((RuntimeError, QkitError)):
        linear(torch.ones(2, 15), ((weight, torch.ones(shape), zero), how))


def test_bits_that_do_not_exist_are_refused():
    packed = pack(torch.zeros(4, 9, dtype=torch.int8), 4)
    with pytest.raises((RuntimeError, QkitError), match="1 to 8 bits"):
        ops.linear(torch.ones(2, 9), packed, torch.ones(4, 1), None, None, 9, 0)
