"""Affine quantization: equal to the slow oracle everywhere, and right where textbooks are not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dequantize_oracle, quantize_oracle

from qkit.errors import InputError, UsageError
from qkit.numerics import (
    QParams,
    QTensor,
    check_finite,
    choose_qparams,
    dequantize,
    qparams_from_range,
    quantize,
)
from qkit.spec import (
    BF16,
    FP12_E5M6,
    FP16,
    FP32,
    Int,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QSpec,
)

# (format, symmetric): every width, signed and unsigned, narrow and full
FORMATS = [
    *((Int(bits, narrow=True), True) for bits in range(2, 9)),
    *((Int(bits), True) for bits in range(2, 9)),
    *((Int(bits), False) for bits in range(1, 9)),
    *((Int(bits, narrow=True), False) for bits in range(2, 9)),
    *((Int(bits, signed=False), False) for bits in range(1, 9)),
]
GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(1),
    PerGroup(4),
    PerGroup(5, axis=0),
    PerGroup(100),
    PerToken(),
    PerBlock((4, 3)),
    PerBlock((2,)),
]
INT8 = QSpec(Int(8, narrow=True), PerTensor())
UINT8 = QSpec(Int(8, signed=False), PerTensor(), symmetric=False)
AFFINE8 = QSpec(Int(8), PerTensor(), symmetric=False)


def name_of(value: object) -> str | None:
    """Readable test ids."""
    if isinstance(value, tuple) and isinstance(value[0], Int):
        fmt, symmetric = value
        return f"{fmt}{'-narrow' if fmt.narrow else ''}-{'sym' if symmetric else 'affine'}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    if isinstance(value, QSpec):
        return f"{value.format}-{'sym' if value.symmetric else 'affine'}"
    return str(value).removeprefix("torch.").replace(" ", "")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def roundtrip(x: torch.Tensor, spec: QSpec) -> tuple[QTensor, torch.Tensor]:
    q = quantize(x, choose_qparams(x, spec), spec)
    return q, dequantize(q, torch.float64 if x.dtype == torch.float64 else torch.float32)


def as_numpy(x: torch.Tensor) -> np.ndarray:
    return x.numpy() if x.dtype == torch.float64 else x.float().numpy()


def assert_equals_oracle(x: torch.Tensor, spec: QSpec) -> None:
    """Codes, scales, zero points and decoded values are equal, bit for bit."""
    assert isinstance(spec.format, Int)
    shape, fmt = tuple(x.shape), spec.format
    blocks = spec.granularity.block_shape(shape)
    codes, scale, zero_point = quantize_oracle(
        as_numpy(x), blocks, fmt.qmin, fmt.qmax, spec.symmetric, str(spec.scale)
    )
    q, decoded = roundtrip(x, spec)
    assert q.qparams.scale.shape == spec.granularity.scale_shape(shape)
    kept_as = "float16" if spec.scale == FP12_E5M6 else spec.scale.torch_name
    assert q.qparams.scale.dtype == getattr(torch, kept_as)
    np.testing.assert_array_equal(q.qparams.scale.double().numpy(), scale)
    if zero_point is None:
        assert q.qparams.zero_point is None
    else:
        np.testing.assert_array_equal(q.qparams.zero_point.numpy(), zero_point)
    assert q.codes.dtype == (torch.int8 if fmt.signed else torch.uint8)
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    exact = dequantize_oracle(codes, scale, zero_point, blocks)
    np.testing.assert_array_equal(decoded.numpy(), exact.astype(decoded.numpy().dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_equals_oracle_for_every_format_and_granularity(form, granularity):
    assert_equals_oracle(randn(7, 13), QSpec(form[0], granularity, form[1]))


@pytest.mark.parametrize("form", [FORMATS[6], FORMATS[16]], ids=name_of)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 31), (31, 1), (3, 7, 5), (33, 31), (2, 3, 3, 5)], ids=name_of
)
def test_equals_oracle_for_odd_shapes(shape, granularity, form):
    assert_equals_oracle(randn(*shape, seed=1), QSpec(form[0], granularity, form[1]))


@pytest.mark.parametrize("n", [1, 3, 7, 31, 33])
@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(0), PerGroup(4), PerToken(), PerBlock((2,))],
    ids=name_of,
)
def test_equals_oracle_for_vectors(granularity, n):
    assert_equals_oracle(randn(n), QSpec(Int(4), granularity, symmetric=False))


@pytest.mark.parametrize("spec", [INT8, AFFINE8], ids=name_of)
def test_equals_oracle_for_a_scalar(spec):
    assert_equals_oracle(torch.tensor(-2.7), spec)


@pytest.mark.parametrize("scale", [FP16, BF16, FP32, FP12_E5M6], ids=name_of)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=name_of
)
@pytest.mark.parametrize("form", FORMATS[6::7], ids=name_of)
def test_equals_oracle_for_every_dtype(form, dtype, scale):
    x = randn(7, 33, seed=2).to(dtype)
    assert_equals_oracle(x, QSpec(form[0], PerGroup(8), form[1], scale=scale))


@pytest.mark.parametrize("scale", [FP16, BF16, FP32], ids=name_of)
def test_scale_is_rounded_up_so_that_nothing_is_clipped(scale):
    x = randn(257, 3, seed=3).double()
    spec = QSpec(Int(8, narrow=True), PerChannel(0), scale=scale)
    stored = choose_qparams(x, spec).scale
    exact = x.abs().amax(1, keepdim=True) / 127
    below = torch.nextafter(stored, torch.zeros_like(stored)).double()
    assert (stored.double() >= exact).all()
    assert (below < exact).all(), "not the least such scale"


# ---------------------------------------------------------------- properties of every input

EPS = 2.0**-24  # half a unit in the last place of fp32, relative
MODERATE = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of every dtype; in fp16, what is too large becomes its greatest value."""
    shape = hnp.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=6)
    x = torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=MODERATE)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return x.clamp(-65504, 65504).half() if dtype == torch.float16 else x.to(dtype)


@st.composite
def specs(draw: st.DrawFn) -> QSpec:
    fmt, symmetric = draw(st.sampled_from(FORMATS))
    kinds = GRANULARITIES
    scale = draw(st.sampled_from([BF16, FP32]))
    return QSpec(fmt, draw(st.sampled_from(kinds)), symmetric, scale=scale)


def per_value(param: torch.Tensor, x: torch.Tensor, spec: QSpec) -> torch.Tensor:
    """A scale spread over the shape of ``x``."""
    for axis, (n, b) in enumerate(zip(x.shape, spec.granularity.block_shape(x.shape), strict=True)):
        param = param.repeat_interleave(b, axis).narrow(axis, 0, n)
    return param


@given(tensors(), specs())
def test_error_is_at_most_half_a_step(x, spec):
    """|x' - x| <= |scale| * (1/2 + 2 * steps * eps).

    The quotient x / scale is at most ``steps = qmax - qmin`` and is rounded to fp32, which moves
    it by at most ``steps * eps``; the product x' is rounded too, by at most that many scales.
    """
    q, decoded = roundtrip(x, spec)
    x = x.to(decoded.dtype)
    steps = spec.format.qmax - spec.format.qmin
    bound = per_value(q.qparams.scale.double().abs(), x, spec) * (0.5 + 2 * steps * EPS)
    assert ((decoded.double() - x.double()).abs() <= bound).all()


@given(tensors(), specs())
def test_codes_and_zero_points_are_within_the_format(x, spec):
    q, _ = roundtrip(x, spec)
    for codes in filter(lambda t: t is not None, (q.codes, q.qparams.zero_point)):
        assert ((codes >= spec.format.qmin) & (codes <= spec.format.qmax)).all()


@given(tensors(), specs())
def test_requantizing_decoded_values_gives_the_same_codes(x, spec):
    q, decoded = roundtrip(x, spec)
    assert torch.equal(quantize(decoded, q.qparams, spec).codes, q.codes)


@given(tensors(), specs())
def test_zero_is_exact(x, spec):
    x = torch.where(torch.arange(x.numel()).reshape(x.shape) % 2 == 0, x, 0.0)
    _, decoded = roundtrip(x, spec)
    assert (decoded[x == 0] == 0).all()


@given(tensors(), specs())
def test_scale_is_normal_and_negative_only_of_a_full_symmetric_range(x, spec):
    scale = choose_qparams(x, spec).scale
    assert (torch.isfinite(scale) & (scale.abs() >= torch.finfo(scale.dtype).tiny)).all()
    assert (scale > 0).all() or (spec.symmetric and not spec.format.narrow)


def test_the_extra_code_of_a_full_range_goes_to_the_greatest_magnitude():
    spec = QSpec(Int(4), PerChannel(0))
    x = torch.tensor([[-8.0, 7.0, 1.0], [8.0, -7.0, 1.0]])
    q, decoded = roundtrip(x, spec)
    assert q.codes.tolist() == [[-8, 7, 1], [-8, 7, -1]]
    assert q.qparams.scale.flatten().tolist() == [1.0, -1.0]
    assert torch.equal(decoded, x)


def test_a_full_range_of_four_bits_gains_a_decibel_over_a_narrow_one():
    x = torch.randn(256, 128)

    def noise(fmt: Int) -> float:
        _, decoded = roundtrip(x, QSpec(fmt, PerGroup(32)))
        return float((decoded - x).square().sum())

    assert noise(Int(4)) < 0.8 * noise(Int(4, narrow=True))


# ---------------------------------------------------------------- textbook traps, one by one


def test_range_without_zero_is_widened_to_contain_it():
    """The bound is that of the property above, with the scale 11 / 255 rounded up."""
    x = torch.linspace(10, 11, 101)
    _, decoded = roundtrip(x, AFFINE8)
    step = 11 / 255 * (1 + 2 * EPS)
    error = (decoded.double() - x.double()).abs().max()
    assert 0.4 * step < float(error) <= step * (0.5 + 2 * 255 * EPS)


@pytest.mark.parametrize("spec", [INT8, AFFINE8, UINT8], ids=name_of)
@pytest.mark.parametrize("value", [5.0, -5.0, 1e-3, -1e30])
def test_constant_block_is_nearly_exact(spec, value):
    """A constant spans the range [0, value], so it is the outermost code: exact up to the scale."""
    _, decoded = roundtrip(torch.full((3, 5), value), spec)
    torch.testing.assert_close(decoded, torch.full((3, 5), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_all_zero_block_is_exactly_zero(form):
    q, decoded = roundtrip(torch.zeros(3, 5), QSpec(form[0], PerChannel(0), form[1]))
    assert (decoded == 0).all()
    assert (q.qparams.scale == torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_one_sided_affine_block_uses_every_code(sign):
    q, _ = roundtrip(sign * torch.linspace(0, 3, 1000), AFFINE8)
    assert (int(q.codes.min()), int(q.codes.max())) == (-128, 127)
    assert int(q.qparams.zero_point) == (-128 if sign > 0 else 127)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_one_sided_symmetric_block_uses_half_of_the_codes(sign):
    q, _ = roundtrip(sign * torch.linspace(0, 3, 1000), INT8)
    assert sorted({int(q.codes.min()), int(q.codes.max())}) == ([0, 127] if sign > 0 else [-127, 0])


@pytest.mark.parametrize("spec", [INT8, AFFINE8], ids=name_of)
@pytest.mark.parametrize("scale", [FP16, BF16, FP32, FP12_E5M6], ids=name_of)
def test_denormal_block_has_a_normal_scale(spec, scale):
    x = torch.tensor([1e-45, -1e-40, 3e-39])
    spec = QSpec(spec.format, spec.granularity, spec.symmetric, scale=scale)
    q, decoded = roundtrip(x, spec)
    tiny = torch.finfo(q.qparams.scale.dtype).tiny
    assert float(q.qparams.scale) == tiny
    assert float((decoded - x).abs().max()) <= tiny / 2


FP32_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize("spec", [INT8, AFFINE8, UINT8], ids=name_of)
@pytest.mark.parametrize("row", [(1.0, 0.5), (-1.0, 1.0), (0.3, -1.0)], ids=name_of)
def test_huge_block_keeps_its_error_bound(spec, row):
    x = torch.tensor(row) * 1e38
    q, decoded = roundtrip(x, spec)
    assert float((decoded - x).abs().max()) <= float(q.qparams.scale) * 0.5001


@pytest.mark.parametrize("spec", [INT8, AFFINE8, UINT8], ids=name_of)
@pytest.mark.parametrize("row", [(1.0, 0.1), (-1.0, 1.0), (1.0, -0.77), (0.3, -1.0)], ids=name_of)
def test_block_at_the_end_of_fp32_is_refused_or_finite(spec, row):
    """The outermost code may lie above the greatest value: it must not decode to infinity."""
    with suppress(InputError):
        _, decoded = roundtrip(torch.tensor(row) * FP32_MAX, spec)
        assert torch.isfinite(decoded).all()


def test_range_that_overflows_the_scale_is_refused():
    spec = QSpec(Int(8, narrow=True), PerTensor(), scale=FP16)
    with pytest.raises(InputError, match=r"overflows the fp16 scale.*layers\.0\.weight"):
        choose_qparams(torch.tensor([1e9]), spec, name="layers.0.weight")
    greatest, spec = 127 * FP12_E5M6.max, replace(spec, scale=FP12_E5M6)
    assert float(choose_qparams(torch.tensor([greatest]), spec).scale) == FP12_E5M6.max
    with pytest.raises(InputError, match="overflows the fp12-e5m6 scale"):
        choose_qparams(torch.tensor([greatest * 1.001]), spec)


def test_float64_values_beyond_fp32_scales_are_refused():
    with pytest.raises(InputError, match="overflows the fp32 scale"):
        choose_qparams(torch.tensor([1e300, -1e300], dtype=torch.float64), AFFINE8)


@pytest.mark.parametrize(
    ("bad", "count"),
    [
        ([float("nan")], "1 NaN and 0 infinite of 6 values"),
        ([float("inf")], "0 NaN and 1 infinite of 6 values"),
        ([float("-inf"), float("inf")], "0 NaN and 2 infinite of 6 values"),
        ([float("nan"), float("-inf"), float("nan")], "2 NaN and 1 infinite of 6 values"),
    ],
    ids=["nan", "inf", "inf-minus-inf", "both"],
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=name_of
)
def test_not_finite_is_refused_with_name_and_count(dtype, bad, count):
    x = torch.tensor([*bad, *[1.0] * (6 - len(bad))], dtype=dtype)
    with pytest.raises(InputError, match=count) as error:
        choose_qparams(x, INT8, name="encoder.fc.weight")
    assert error.value.where == "encoder.fc.weight"
    assert "encoder.fc.weight" in str(error.value)
    assert error.value.exit_code == 3


def test_fp8_has_no_infinity_to_look_for_but_may_be_nan():
    x = torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="1 NaN and 0 infinite of 2 values"):
        check_finite(x, "fc.weight")


def test_large_finite_sums_are_not_mistaken_for_infinity():
    check_finite(torch.full((100,), FP32_MAX), "x")
    check_finite(torch.full((100,), 1e308, dtype=torch.float64), "x")
    check_finite(torch.full((100,), 65504.0, dtype=torch.float16), "x")


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool], ids=name_of)
def test_only_real_floats_are_quantized(dtype):
    with pytest.raises(InputError, match="only real floating-point"):
        choose_qparams(torch.ones(2, dtype=dtype), INT8)


def test_a_float_format_has_neither_scale_nor_codes():
    spec = QSpec(FP16, PerTensor())
    with pytest.raises(TypeError, match="fp16 has no scale"):
        choose_qparams(torch.ones(2), spec)
    with pytest.raises(TypeError, match="fp16 has no codes"):
        quantize(torch.ones(2), QParams(torch.ones(1)), spec)


def test_symmetric_one_bit_integer_is_a_usage_error():
    """Its only codes are -1 and 0: no positive value has one."""
    with pytest.raises(UsageError, match="1-bit"):
        choose_qparams(torch.ones(2), QSpec(Int(1), PerTensor(), symmetric=True))


def test_values_outside_a_given_range_saturate():
    qparams = qparams_from_range(torch.tensor([-1.0]), torch.tensor([1.0]), INT8)
    q = quantize(torch.tensor([-9.0, -1.0, 0.0, 1.0, 3e38]), qparams, INT8)
    assert q.codes.tolist() == [-127, -127, 0, 127, 127]


def test_ties_go_to_even():
    q = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), QParams(torch.ones(1)), INT8)
    assert q.codes.tolist() == [0, 2, 2, 0, -2]


def test_float64_values_are_divided_in_float64():
    x = torch.tensor([0.5 + 2.0**-30, 0.5, 0.5 - 2.0**-30, 1.5 - 2.0**-30], dtype=torch.float64)
    assert quantize(x, QParams(torch.ones(1)), INT8).codes.tolist() == [1, 0, 0, 1]


# ---------------------------------------------------------------- memory, shapes, threads

VIEWS = {
    "transposed": lambda x: x.t(),
    "every-other-column": lambda x: x[:, ::2],
    "flipped-rows": lambda x: x.flip(0)[::3],
    "expanded": lambda x: x[:1].expand(5, -1),
    "offset": lambda x: x[1:, 3:],
}


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous_input_gives_the_same_result(view, granularity):
    x = VIEWS[view](randn(9, 14))
    spec = QSpec(Int(4), granularity, symmetric=False)
    q, want = (
        roundtrip(x, spec)[0],
        roundtrip(x.clone(memory_format=torch.contiguous_format), spec)[0],
    )
    assert torch.equal(q.codes, want.codes)
    assert torch.equal(q.qparams.scale, want.qparams.scale)
    assert torch.equal(q.qparams.zero_point, want.qparams.zero_point)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (2, 3, 0)], ids=name_of)
def test_empty_tensor_stays_empty(shape, granularity):
    spec = QSpec(Int(8), granularity, symmetric=False)
    q, decoded = roundtrip(torch.empty(shape), spec)
    assert q.codes.shape == decoded.shape == shape
    assert q.qparams.scale.shape == granularity.scale_shape(shape)
    assert torch.isfinite(q.qparams.scale).all()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("shape", [(6, 8), (7, 13)], ids=name_of)
def test_inputs_are_not_modified(shape, dtype, granularity):
    x, spec = randn(*shape).to(dtype), QSpec(Int(4), granularity, symmetric=False)
    before = x.clone()
    q, decoded = roundtrip(x, spec)
    kept = [t.clone() for t in (q.codes, q.qparams.scale, q.qparams.zero_point)]
    decoded.zero_()
    dequantize(q)
    assert torch.equal(x, before)
    assert all(map(torch.equal, (q.codes, q.qparams.scale, q.qparams.zero_point), kept))


def test_group_scales_follow_an_outlier_where_channel_scales_cannot():
    weight = randn(8, 64)
    weight[:, 5] = 100.0
    error = {}
    for granularity in (PerGroup(16), PerChannel(0)):
        q, decoded = roundtrip(weight, QSpec(Int(4, narrow=True), granularity))
        assert q.qparams.scale.shape == granularity.scale_shape((8, 64))
        error[type(granularity)] = float((decoded - weight).square().mean())
    assert PerGroup(16).scale_shape((8, 64)) == (8, 4)
    assert error[PerGroup] < error[PerChannel] / 2


def test_a_short_last_group_has_its_own_scale():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.5]])
    q, _ = roundtrip(x, QSpec(Int(8, narrow=True), PerGroup(4)))
    torch.testing.assert_close(q.qparams.scale, torch.tensor([[4 / 127, 0.5 / 127]]))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(48)], ids=name_of)
def test_result_does_not_depend_on_the_number_of_threads(granularity):
    x, spec = randn(256, 1000), QSpec(Int(4), granularity, symmetric=False)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            q, decoded = roundtrip(x, spec)
            results.append((q.codes, q.qparams.scale, q.qparams.zero_point, decoded))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_narrow_outputs_are_the_fp32_values_rounded(dtype):
    q, decoded = roundtrip(randn(7, 13), QSpec(Int(4), PerGroup(4), symmetric=False))
    assert torch.equal(dequantize(q, dtype), decoded.to(dtype))


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QSpec(Int(4, narrow=True), PerGroup(32)), 4 + 32 / 32),
        (QSpec(Int(4), PerGroup(32), symmetric=False), 4 + 40 / 32),
        (QSpec(Int(4, narrow=True), PerGroup(32), scale=FP16), 4 + 16 / 32),
        (QSpec(Int(8, narrow=True), PerChannel(0)), 8 + 32 / 64),
    ],
    ids=["w4-g32", "w4-g32-asym", "w4-g32-fp16-scale", "w8-channel"],
)
def test_bits_per_weight_counts_scales_and_zero_points(spec, bits):
    assert roundtrip(randn(4, 64), spec)[0].bits_per_weight == bits
