"""Narrow floats and codebooks with a scale: equal to the slow oracle, for any granularity."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    NARROW,
    blocks_of,
    dequantize_oracle,
    narrow_values,
    nearest_oracle,
    quantize_table_oracle,
)

from qkit.errors import InputError
from qkit.numerics import QParams, QTensor, choose_qparams, dequantize, quantize
from qkit.numerics.values import decode, encode, midpoints
from qkit.spec import (
    BF16,
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    NF4,
    Codebook,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QSpec,
    parse,
)

FLOATS = [FP8_E4M3, FP8_E5M2, FP4_E2M1]
LOPSIDED = Codebook("lopsided", (-3.0, -0.25, 0.0, 1.0, 2.5))
FORMS = [
    *((fmt, scale) for fmt in FLOATS for scale in (FP32, FP16, BF16, E8M0)),
    *((fmt, scale) for fmt in (NF4, LOPSIDED) for scale in (FP32, FP16, BF16)),
]
GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(1),
    PerGroup(4),
    PerGroup(5, axis=0),
    PerGroup(32),
    PerToken(),
    PerBlock((4, 3)),
    PerBlock((2,)),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value).removeprefix("torch.").replace(" ", "")


forms = pytest.mark.parametrize("form", FORMS, ids=name_of)
floats = pytest.mark.parametrize("fmt", FLOATS, ids=name_of)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_of(fmt) -> list[float]:
    return list(fmt.entries) if isinstance(fmt, Codebook) else narrow_values(str(fmt))


def roundtrip(x: torch.Tensor, spec: QSpec) -> tuple[QTensor, torch.Tensor]:
    q = quantize(x, choose_qparams(x, spec), spec)
    return q, dequantize(q, torch.float64 if x.dtype == torch.float64 else torch.float32)


def assert_equals_oracle(x: torch.Tensor, spec: QSpec) -> None:
    """Codes, scales and decoded values are equal, bit for bit."""
    values = values_of(spec.format)
    blocks = spec.granularity.block_shape(tuple(x.shape))
    array = x.numpy() if x.dtype == torch.float64 else x.float().numpy()
    floats = not isinstance(spec.format, Codebook)
    codes, scale = quantize_table_oracle(array, blocks, values, str(spec.scale), floats=floats)
    q, decoded = roundtrip(x, spec)
    assert q.qparams.zero_point is None
    assert q.qparams.scale.shape == spec.granularity.scale_shape(tuple(x.shape))
    assert q.qparams.scale.dtype == getattr(torch, spec.scale.torch_name)
    np.testing.assert_array_equal(q.qparams.scale.double().numpy(), scale)
    assert q.codes.dtype == torch.uint8
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    exact = np.zeros(codes.shape)
    for block, inside in blocks_of(codes.shape, blocks):
        for i in inside:
            value = np.float64(values[codes[i]]).astype(decoded.numpy().dtype)
            exact[i] = float(value * decoded.numpy().dtype.type(scale[block]))
    np.testing.assert_array_equal(decoded.numpy(), exact)


# ---------------------------------------------------------------- the table itself


@floats
def test_every_pattern_has_the_value_that_ml_dtypes_gives_it(fmt):
    np.testing.assert_array_equal(
        [fmt.value(pattern) for pattern in range(1 << fmt.bits)], narrow_values(str(fmt))
    )
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(decode(codes, fmt, dtype).numpy(), narrow_values(str(fmt)))


@floats
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_codes_equal_ml_dtypes_on_every_16_bit_input(fmt, source):
    x = np.arange(65536, dtype=np.uint16).view(source).astype(np.float32)
    x = x[np.isfinite(x)]
    want = np.clip(x, -fmt.max, fmt.max).astype(NARROW[str(fmt)]).view(np.uint8)
    np.testing.assert_array_equal(encode(torch.from_numpy(x), fmt).numpy(), want)


@floats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_ties_go_to_the_even_pattern_and_their_neighbours_do_not(fmt, dtype):
    values = torch.tensor([fmt.value(p) for p in range(fmt.top + 1)], dtype=dtype)
    ties = (values[1:] + values[:-1]) / 2
    places = torch.arange(fmt.top)
    assert torch.equal(encode(ties, fmt).long(), places + places % 2)
    assert torch.equal(encode(torch.nextafter(ties, ties * 2), fmt).long(), places + 1)
    assert torch.equal(encode(torch.nextafter(ties, ties * 0), fmt).long(), places)
    assert torch.equal(encode(-ties, fmt), encode(ties, fmt) + (1 << (fmt.bits - 1)))


@floats
def test_what_is_too_large_saturates(fmt):
    x = torch.tensor([1.0, 1.0001, 100.0, math.inf]) * fmt.max
    assert encode(x, fmt).tolist() == [fmt.top] * 4
    assert encode(-x, fmt).tolist() == [fmt.top + (1 << (fmt.bits - 1))] * 4


def test_a_code_is_a_bit_pattern_that_torch_can_view():
    x = randn(1000).clamp(-448, 448)
    assert torch.equal(
        encode(x, FP8_E4M3).view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float()
    )


@pytest.mark.parametrize("fmt", [NF4, LOPSIDED], ids=name_of)
def test_the_tie_between_entries_goes_to_the_lower(fmt):
    entries = torch.tensor(fmt.entries, dtype=torch.float64)
    ties, places = (entries[1:] + entries[:-1]) / 2, torch.arange(len(entries) - 1)
    assert torch.equal(encode(ties, fmt).long(), places)
    above = torch.nextafter(ties, torch.full_like(ties, torch.inf))
    assert torch.equal(encode(above, fmt).long(), places + 1)
    assert torch.equal(encode(entries, fmt).long(), torch.arange(len(entries)))


@given(st.floats(-2, 2, width=32))
def test_the_nearest_entry_is_exact_although_fp32_has_no_such_midpoint(x):
    (code,) = encode(torch.tensor([x]), NF4).tolist()
    assert code == nearest_oracle(x, NF4.entries, floats=False)


def test_midpoints_between_neighbouring_floats_keep_them_apart():
    pair = torch.tensor([1.0, 1.0 + 2.0**-23], dtype=torch.float64)
    assert torch.bucketize(pair.float(), midpoints(pair, torch.float32)).tolist() == [0, 1]


# ---------------------------------------------------------------- with a scale, by the oracle


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@forms
def test_equals_oracle_for_every_format_and_granularity(form, granularity):
    assert_equals_oracle(randn(7, 13), QSpec(form[0], granularity, scale=form[1]))


@pytest.mark.parametrize("granularity", [PerGroup(32), PerBlock((2, 2)), PerChannel(1)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 7, 5), (2, 3, 3, 5)], ids=name_of)
@pytest.mark.parametrize("form", [(FP4_E2M1, E8M0), (FP8_E4M3, FP32), (NF4, BF16)], ids=name_of)
def test_equals_oracle_for_odd_shapes(shape, granularity, form):
    assert_equals_oracle(randn(*shape, seed=1), QSpec(form[0], granularity, scale=form[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@forms
def test_equals_oracle_for_every_dtype(form, dtype):
    assert_equals_oracle(randn(5, 33, seed=2).to(dtype), QSpec(form[0], PerGroup(8), scale=form[1]))


@pytest.mark.parametrize("exponent", [-149, -130, -20, 0, 20, 100])
@forms
def test_equals_oracle_for_every_magnitude(form, exponent):
    if form[1] == FP16 and exponent > 0:
        return
    x = randn(4, 9, seed=3).double().mul(2.0**exponent).float()
    assert_equals_oracle(x, QSpec(form[0], PerChannel(0), scale=form[1]))


# ---------------------------------------------------------------- properties of every input


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)
    elements = st.floats(-(2.0**100), 2.0**100, width=32)
    return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))


@st.composite
def specs(draw: st.DrawFn) -> QSpec:
    fmt, scale = draw(st.sampled_from([form for form in FORMS if form[1] != FP16]))
    kinds = [PerTensor(), PerChannel(0), PerToken(), PerGroup(1), PerGroup(4), PerBlock((3,))]
    return QSpec(fmt, draw(st.sampled_from(kinds)), scale=scale)


@given(tensors(), specs())
def test_requantizing_decoded_values_gives_the_same_codes(x, spec):
    q, decoded = roundtrip(x, spec)
    assert torch.equal(quantize(decoded, q.qparams, spec).codes, q.codes)


@given(tensors(), specs())
def test_error_is_at_most_half_a_spacing_inside_the_range(x, spec):
    """Plus the rounding of the quotient and of the product, each 2^-24 of their size."""
    q, decoded = roundtrip(x, spec)
    finite = np.unique([v for v in values_of(spec.format) if math.isfinite(v)])
    step = dequantize_oracle(
        np.ones(x.shape, int),
        q.qparams.scale.double().numpy(),
        None,
        spec.granularity.block_shape(tuple(x.shape)),
    )
    quotient = x.double().numpy() / step
    place = np.clip(np.searchsorted(finite, quotient), 1, len(finite) - 1)
    half = (finite[place] - finite[place - 1]) / 2 * step
    inside = (quotient >= finite[0]) & (quotient <= finite[-1])
    error = np.abs(decoded.double().numpy() - x.double().numpy())
    slack = 2.0**-23 * np.abs(x.double().numpy()) + 2.0**-149
    assert (error <= half + slack)[inside].all()


@given(tensors(), specs())
def test_only_microscaling_leaves_values_outside_its_range(x, spec):
    scale = choose_qparams(x, spec).scale.double().numpy()
    blocks = spec.granularity.block_shape(tuple(x.shape))
    reach = dequantize_oracle(np.ones(x.shape, int), scale * spec.format.max, None, blocks)
    factor = 2 if spec.scale == E8M0 else 1
    assert (np.abs(x.double().numpy()) <= reach * factor).all()


@given(tensors(), specs())
def test_zero_is_exact(x, spec):
    x = torch.where(torch.arange(x.numel()).reshape(x.shape) % 2 == 0, x, 0.0)
    _, decoded = roundtrip(x, spec)
    assert (decoded[x == 0] == 0).all()


# ---------------------------------------------------------------- one by one


@forms
def test_all_zero_block_is_exactly_zero(form):
    q, decoded = roundtrip(torch.zeros(3, 5), QSpec(form[0], PerChannel(0), scale=form[1]))
    assert (decoded == 0).all()
    tiny = 2.0**-127 if form[1] == E8M0 else torch.finfo(q.qparams.scale.dtype).tiny
    assert (q.qparams.scale.double() == tiny).all()


def test_microscaling_follows_the_specification():
    """Section 6.3: the greatest power of two in the block over that of the format; 7.9 is cut."""
    spec = parse("mxfp4").weight
    assert (spec.granularity, spec.scale, spec.format) == (PerGroup(32), E8M0, FP4_E2M1)
    x = torch.tensor([[7.9, -7.0, 2.5, -0.25, 0.75, *[0.0] * 27, 0.01]])
    q, decoded = roundtrip(x, spec)
    assert q.qparams.scale.double().tolist() == [[1.0, 2.0**-9]]
    assert decoded[0, :5].tolist() == [6.0, -6.0, 2.0, -0.0, 1.0]
    assert float(decoded[0, 32]) == 6 * 2.0**-9  # 0.01 * 2^9 is nearer to 6 than to 4
    assert q.bits_per_weight == 4 + 2 * 8 / 33


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8-e5m2"])
def test_microscaling_equals_its_own_decoded_values(name):
    x, spec = randn(8, 100, seed=4), parse(name).weight
    q, decoded = roundtrip(x, spec)
    again, same = roundtrip(decoded, spec)
    assert torch.equal(again.qparams.scale.double(), q.qparams.scale.double())
    assert torch.equal(same, decoded)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8-e5m2", "nf4"])
def test_the_greatest_fp32_stays_finite(name):
    x = torch.full((1, 32), torch.finfo(torch.float32).max)
    _, decoded = roundtrip(x, parse(name).weight)
    assert torch.isfinite(decoded).all()


def test_a_range_beyond_the_shared_exponent_is_refused():
    x = torch.full((1, 32), 1e300, dtype=torch.float64)
    with pytest.raises(InputError, match=r"overflows the e8m0 scale.*head\.weight"):
        choose_qparams(x, parse("mxfp4").weight, name="head.weight")


def test_nf4_is_exact_at_its_greatest_magnitude():
    x = torch.tensor([[0.3, -1.7, 0.2]])
    q, decoded = roundtrip(x, parse("nf4").weight)
    assert float(q.qparams.scale) == float(x.abs().max())
    assert decoded[0, 1] == x[0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["nf4", "mxfp4", "fp8-channel"])
def test_not_finite_is_refused(name, bad):
    with pytest.raises(InputError, match="the tensor is not finite"):
        choose_qparams(torch.tensor([[1.0, bad]]), parse(name).weight)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)], ids=name_of)
def test_empty_tensor_stays_empty(shape, granularity):
    for fmt, scale in ((NF4, FP32), (FP4_E2M1, E8M0)):
        q, decoded = roundtrip(torch.empty(shape), QSpec(fmt, granularity, scale=scale))
        assert q.codes.shape == decoded.shape == shape
        assert q.qparams.scale.shape == granularity.scale_shape(shape)


def test_non_contiguous_input_gives_the_same_result():
    x = randn(9, 14)
    for view in (x.t(), x[:, ::2], x.flip(0)[::3], x[:1].expand(5, -1)):
        for fmt, scale in FORMS:
            spec = QSpec(fmt, PerGroup(4), scale=scale)
            q, want = roundtrip(view, spec)[0], roundtrip(view.contiguous(), spec)[0]
            assert torch.equal(q.codes, want.codes)


def test_input_is_not_modified():
    x = randn(4, 64)
    before = x.clone()
    for fmt, scale in FORMS:
        roundtrip(x, QSpec(fmt, PerGroup(32), scale=scale))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@forms
def test_narrow_outputs_are_the_fp32_values_rounded(form, dtype):
    q, decoded = roundtrip(randn(7, 13), QSpec(form[0], PerGroup(4), scale=form[1]))
    assert torch.equal(dequantize(q, dtype), decoded.to(dtype))


def test_float64_values_are_divided_in_float64():
    x = torch.tensor([0.25 + 2.0**-40, 0.25], dtype=torch.float64)  # 0.25 ties to zero
    q = quantize(x, QParams(torch.ones(1)), QSpec(FP4_E2M1, PerTensor()))
    assert q.codes.tolist() == [1, 0]
