"""Fake quantization: the real numbers forward, the stated formulas backward."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import blocks_of

from qkit.numerics import QParams, choose_qparams, dequantize, fake_quantize, quantize
from qkit.spec import (
    BF16,
    FP16,
    Int,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QSpec,
)

FORMATS = [
    (Int(8, narrow=True), True),
    (Int(8), False),
    (Int(8, signed=False), False),
    (Int(4), True),
    (Int(2), True),
    (Int(3, signed=False), False),
    (Int(1), False),
]
GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerGroup(4),
    PerToken(),
    PerBlock((2, 3)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def name_of(value: object) -> str | None:
    if isinstance(value, tuple) and value and isinstance(value[0], Int):
        return f"{value[0]}-{'sym' if value[1] else 'affine'}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(value).removeprefix("torch.").replace(" ", "")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shrunk(qparams: QParams, by: float = 0.6) -> QParams:
    """Parameters that clip some of the data."""
    return QParams(qparams.scale * by, qparams.zero_point)


def gradients(x, qparams, spec, weight, gradient_scale=1.0):
    """Gradients of ``(fake_quantize(x) * weight).sum()`` for x, scale and zero point."""
    x = x.detach().clone().requires_grad_()
    scale = qparams.scale.detach().clone().requires_grad_()
    zero = qparams.zero_point
    if zero is not None:
        zero = zero.detach().to(scale.dtype).clone().requires_grad_()
    y = fake_quantize(x, QParams(scale, zero), spec, gradient_scale=gradient_scale)
    (y * weight).sum().backward()
    return x.grad, scale.grad, None if zero is None else zero.grad


def gradients_oracle(x, scale, zero_point, weight, spec):
    """The formulas of LSQ and LSQ+, value by value, in float64."""
    fmt, blocks = spec.format, spec.granularity.block_shape(x.shape)
    to_x, to_scale, to_zero = np.zeros(x.shape), np.zeros(scale.shape), np.zeros(scale.shape)
    for block, inside in blocks_of(x.shape, blocks):
        s, z = float(scale[block]), float(zero_point[block])
        for i in inside:
            v = float(x[i]) / s
            code = round(v) + z
            if code < fmt.qmin:
                to_scale[block] += weight[i] * (fmt.qmin - z)
                to_zero[block] -= weight[i] * s
            elif code > fmt.qmax:
                to_scale[block] += weight[i] * (fmt.qmax - z)
                to_zero[block] -= weight[i] * s
            else:
                to_x[i] = weight[i]
                to_scale[block] += weight[i] * (round(v) - v)
    return to_x, to_scale, to_zero


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_forward_is_quantize_and_dequantize_bit_for_bit(form, granularity, dtype):
    for scale_format in (FP16, BF16):
        spec = QSpec(form[0], granularity, form[1], scale=scale_format)
        x = 3 * randn(7, 13).to(dtype)
        for qparams in (choose_qparams(x, spec), shrunk(choose_qparams(x, spec))):
            y = fake_quantize(x, qparams, spec)
            assert y.dtype == dtype
            assert torch.equal(y, dequantize(quantize(x, qparams, spec), dtype))


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (7,), (31, 33), (1, 31), (33, 3, 7)], ids=name_of
)
@pytest.mark.parametrize("form", FORMATS[:4], ids=name_of)
def test_odd_shapes(form, shape):
    spec = QSpec(form[0], PerGroup(4) if shape else PerTensor(), form[1])
    x = randn(*shape).requires_grad_()
    qparams = choose_qparams(x.detach(), spec)
    y = fake_quantize(x, qparams, spec)
    assert torch.equal(y, dequantize(quantize(x.detach(), qparams, spec)))
    y.sum().backward()
    # Nothing is outside of min-max's range, but for an end of a block that is exactly half a step
    # beyond the last code and rounds away from it.
    allowed = 0 if form[0].narrow else qparams.scale.numel()
    assert (x.grad == 0).sum() <= allowed
    assert (x.grad == 1).sum() + (x.grad == 0).sum() == x.numel()


def test_an_empty_tensor_stays_empty():
    spec = QSpec(Int(8, narrow=True), PerTensor())
    x = torch.zeros(0, 3, requires_grad=True)
    y = fake_quantize(x, choose_qparams(x.detach(), spec), spec)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_gradients_equal_the_formulas(form, granularity):
    spec = QSpec(form[0], granularity, form[1])
    x, weight = randn(7, 13).double(), randn(7, 13, seed=1).double()
    qparams = choose_qparams(x, spec)
    qparams = shrunk(QParams(qparams.scale.double(), qparams.zero_point))
    zero = torch.zeros_like(qparams.scale) if form[1] else qparams.zero_point
    expected = gradients_oracle(
        x.numpy(), qparams.scale.numpy(), zero.numpy(), weight.numpy(), spec
    )
    found = gradients(x, qparams, spec, weight)
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None:
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-12, atol=1e-12)
    assert (found[2] is None) == form[1]
    assert 0 < (expected[0] == 0).sum() < x.numel() or form[0].bits < 3


values = st.floats(-100, 100, width=32)


@given(
    hnp.arrays(np.float32, st.sampled_from([1, 3, 7, 31, 33]), elements=values),
    st.sampled_from(FORMATS),
    st.floats(1e-3, 10),
    st.booleans(),
)
def test_gradients_equal_the_formulas_for_any_data(x, form, size, negative):
    spec = QSpec(form[0], PerTensor(), form[1])
    scale = torch.tensor([-size if negative else size], dtype=torch.float64)
    zero = None if form[1] else torch.tensor([form[0].qmin + 1])
    weight = np.linspace(-1, 1, len(x))
    given_zero = np.zeros(1) if zero is None else zero.numpy()
    expected = gradients_oracle(x.astype(np.float64), scale.numpy(), given_zero, weight, spec)
    data = torch.from_numpy(x).double()
    found = gradients(data, QParams(scale, zero), spec, torch.from_numpy(weight))
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None:
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-9, atol=1e-9)


def test_lsq_as_printed_in_the_paper():
    """Equation 3 of Esser et al., outside of the half step beyond the last code."""
    spec = QSpec(Int(3), PerTensor())
    x = torch.tensor([-9.0, -4.6, -3.3, -0.2, 0.0, 1.4, 2.9, 3.6, 20.0])
    expected = [-4, -4, -3 + 3.3, 0.2, 0, 1 - 1.4, 3 - 2.9, 3, 3]
    for i, value in enumerate(expected):
        _, to_scale, _ = gradients(x[i : i + 1], QParams(torch.ones(1)), spec, torch.ones(1))
        assert float(to_scale) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4)], ids=name_of)
def test_the_gradient_scale_is_that_of_lsq(granularity):
    spec = QSpec(Int(4), granularity)
    x, weight = randn(3, 8), randn(3, 8, seed=1)
    qparams = shrunk(choose_qparams(x, spec))
    plain, scaled = (gradients(x, qparams, spec, weight, g) for g in (1.0, None))
    n = math.prod(granularity.block_shape((3, 8)))
    torch.testing.assert_close(scaled[1], plain[1] / math.sqrt(n * 7))
    assert torch.equal(scaled[0], plain[0])


def test_a_negative_scale_mirrors_the_data():
    """Full symmetric formats: -scale for x is +scale for -x, forward and backward."""
    spec = QSpec(Int(4), PerTensor())
    x, weight = randn(33), randn(33, seed=1)
    scale = torch.tensor([0.2])
    assert torch.equal(
        fake_quantize(x, QParams(-scale), spec), -fake_quantize(-x, QParams(scale), spec)
    )
    one = gradients(x, QParams(-scale), spec, weight)
    two = gradients(-x, QParams(scale), spec, weight)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_learning_the_step_lowers_the_error_whatever_its_sign():
    spec = QSpec(Int(3), PerTensor())
    for sign in (1, -1):
        x = randn(2000)
        start = choose_qparams(sign * torch.cat([x, torch.tensor([9.0])]), spec).scale
        assert float(start) * sign < 0
        scale = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([scale], lr=0.1)
        losses = []
        for _ in range(200):
            optimizer.zero_grad()
            loss = (fake_quantize(x, QParams(scale), spec, gradient_scale=1.0) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.3 * losses[0]
        assert torch.equal(scale.sign(), start.sign())


def test_a_learned_zero_point_follows_shifted_data():
    spec = QSpec(Int(4), PerTensor(), symmetric=False)
    x = randn(2000) + 2
    scale = torch.tensor([0.4])
    zero = torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.SGD([zero], lr=20.0)
    for _ in range(100):
        optimizer.zero_grad()
        y = fake_quantize(x, QParams(scale, zero), spec, gradient_scale=1.0)
        (y - x).square().mean().backward()
        optimizer.step()
    # 16 steps of 0.4 cover 2 +- 3.2 where zero is the code -8 + 1.2 / 0.4.
    assert -7 <= float(zero.detach()) <= -3.5


def surrogate(x, scale, zero, x0, scale0, zero0, fmt):
    """Fake quantization whose roundings add, and whose clamps choose, what they do at the start."""
    v0 = x0 / scale0
    code = torch.round(v0) + torch.round(zero0)
    v = x / scale + (torch.round(v0) - v0)
    z = zero + (torch.round(zero0) - zero0)
    v = torch.where(code < fmt.qmin, fmt.qmin - z, v)
    return torch.where(code > fmt.qmax, fmt.qmax - z, v) * scale


def test_gradients_are_those_of_rounding_as_a_constant():
    """Central differences of the straight-through surrogate."""
    spec = QSpec(Int(4), PerTensor(), symmetric=False)
    x = torch.linspace(-4, 4, 33, dtype=torch.float64) + 0.013
    scale = torch.tensor([0.31], dtype=torch.float64)
    zero = torch.tensor([-2.2], dtype=torch.float64)
    weight = randn(33).double()
    start = (x, scale, zero)

    def loss(*args):
        return float((surrogate(*args, *start, spec.format) * weight).sum())

    found = gradients(x, QParams(scale, zero), spec, weight)
    for k, gradient in enumerate(found):
        for i in range(start[k].numel()):
            ends = []
            for step in (1e-6, -1e-6):
                args = [a.clone() for a in start]
                args[k][i] += step
                ends.append(loss(*args))
            assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_equal_to_torch_per_tensor(dtype):
    # torch multiplies by 1 / scale: a power of two makes that the same.
    x = (4 * randn(33, 31)).to(dtype).requires_grad_()
    spec = QSpec(Int(8), PerTensor(), symmetric=False)
    mine = fake_quantize(x, QParams(torch.tensor([[1 / 32]]), torch.tensor([[3]])), spec)
    (to_x,) = torch.autograd.grad((mine * x.detach()).sum(), x)
    theirs = torch.fake_quantize_per_tensor_affine(x, 1 / 32, 3, -128, 127)
    (expected,) = torch.autograd.grad((theirs * x.detach()).sum(), x)
    assert torch.equal(mine, theirs)
    assert torch.equal(to_x, expected)
    assert 0 < (to_x == 0).sum() < x.numel()


def test_equal_to_torch_per_channel():
    x = (4 * randn(7, 31)).requires_grad_()
    spec = QSpec(Int(8, narrow=True), PerChannel(0))
    scale = 2.0 ** torch.arange(-8, -1)
    mine = fake_quantize(x, QParams(scale[:, None]), spec)
    (to_x,) = torch.autograd.grad((mine * x.detach()).sum(), x)
    zeros = torch.zeros(7, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -127, 127)
    (expected,) = torch.autograd.grad((theirs * x.detach()).sum(), x)
    assert torch.equal(mine, theirs)
    assert torch.equal(to_x, expected)


def test_equal_to_torch_with_a_learned_step():
    x, weight = 4 * randn(500), randn(500, seed=1)
    scale, zero = torch.tensor([1 / 16]), torch.tensor([5.0])
    theirs = [t.clone().requires_grad_() for t in (x, scale, zero)]
    y = torch._fake_quantize_learnable_per_tensor_affine(*theirs, -32, 31, 1.0)
    (y * weight).sum().backward()
    spec = QSpec(Int(6), PerTensor(), symmetric=False)
    mine = gradients(x, QParams(scale, zero), spec, weight)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two.grad, rtol=1e-4, atol=1e-4)


def test_only_what_requires_a_gradient_gets_one():
    spec = QSpec(Int(8), PerTensor(), symmetric=False)
    x = randn(33)
    qparams = choose_qparams(x, spec)
    assert not fake_quantize(x, qparams, spec).requires_grad
    scale = qparams.scale.clone().requires_grad_()
    fake_quantize(x, QParams(scale, qparams.zero_point), spec).sum().backward()
    assert scale.grad is not None


def test_nan_stays_and_infinity_is_clamped():
    spec = QSpec(Int(4), PerTensor())
    x = torch.tensor([math.inf, -math.inf, 1.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    y = fake_quantize(x, QParams(scale), spec, gradient_scale=1.0)
    assert y.tolist() == [3.5, -4.0, 1.0]
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1]
    assert scale.grad.tolist() == [7 - 8 + 0]
    assert fake_quantize(torch.tensor([math.nan]), QParams(scale), spec).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=name_of)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45], ids=str)
def test_a_step_of_zero_does_not_divide(scale, dtype):
    spec = QSpec(Int(4), PerTensor())
    x = randn(7).to(dtype).requires_grad_()
    step = torch.tensor([scale], requires_grad=True)
    y = fake_quantize(x, QParams(step), spec)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(step.grad).all()


def test_a_float_format_is_not_fake_quantized():
    with pytest.raises(TypeError, match="no codes"):
        fake_quantize(randn(3), QParams(torch.ones(1)), QSpec(FP16, PerTensor()))


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerBlock((7, 500))], ids=name_of
)
def test_threads_do_not_matter(granularity):
    """Not even in the last bit of a sum in fp64."""
    spec = QSpec(Int(4), granularity, symmetric=False)
    x = randn(33, 4001).double()
    qparams = shrunk(choose_qparams(x, spec))
    qparams = QParams(qparams.scale.double(), qparams.zero_point)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((fake_quantize(x, qparams, spec), *gradients(x, qparams, spec, x)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# torch's own tracer makes an instance of autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_whole_by_torch_compile():
    spec = QSpec(Int(4), PerGroup(4), symmetric=False)
    x, weight = randn(7, 13), randn(7, 13, seed=1)
    qparams = shrunk(choose_qparams(x, spec))

    def run(function):
        leaf, scale = x.clone().requires_grad_(), qparams.scale.clone().requires_grad_()
        y = function(leaf, QParams(scale, qparams.zero_point), spec)
        (y * weight).sum().backward()
        return y.detach(), leaf.grad, scale.grad

    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    for one, two in zip(run(compiled), run(fake_quantize), strict=True):
        assert torch.equal(one, two)
