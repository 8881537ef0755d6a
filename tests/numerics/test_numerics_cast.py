"""Float casts: equal to numpy's and ml_dtypes' on every bit pattern, and honest about losses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qkit.errors import InputError, RequestError
from qkit.numerics import CastLoss, cast
from qkit.spec import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP8_E5M2, FP16, FP32

FORMATS = {
    "fp16": (FP16, np.float16),
    "bf16": (BF16, ml_dtypes.bfloat16),
    "fp8-e4m3": (FP8_E4M3, ml_dtypes.float8_e4m3fn),
    "fp8-e5m2": (FP8_E5M2, ml_dtypes.float8_e5m2),
}
both = pytest.mark.parametrize(("fmt", "numpy_type"), FORMATS.values(), ids=FORMATS)
narrow = pytest.mark.parametrize(("fmt", "numpy_type"), [*FORMATS.values()][2:], ids=[*FORMATS][2:])


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bit patterns as integers."""
    if isinstance(x, torch.Tensor):
        x = x.view(torch.int16 if x.element_size() == 2 else torch.uint8).numpy()
    return x.view(np.uint16 if x.itemsize == 2 else np.uint8)


@both
def test_every_finite_pattern_survives_a_round_trip(fmt, numpy_type):
    patterns = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    values = patterns.view(numpy_type).astype(np.float32)
    finite = np.isfinite(values)
    y, loss = cast(torch.from_numpy(values[finite]), fmt)
    np.testing.assert_array_equal(bits(y), patterns[finite])
    assert loss == CastLoss(0, 0)


@both
def test_equals_numpy_on_random_fp32_patterns(fmt, numpy_type):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1 << 17, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([x, rng.standard_normal(1 << 16).astype(np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(numpy_type)
        largest = np.nanmax(np.abs(x - want.astype(np.float32))[np.isfinite(want.astype("f4"))])
    kept = np.isfinite(x) & np.isfinite(want.astype(np.float32))
    y, loss = cast(torch.from_numpy(x[kept]), fmt)
    np.testing.assert_array_equal(bits(y), bits(want[kept]))
    assert loss.underflow == int(((want[kept].astype(np.float32) == 0) & (x[kept] != 0)).sum())
    assert loss.max_error == largest


@narrow
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_equals_torch_and_ml_dtypes_on_every_16_bit_input(fmt, numpy_type, source):
    """And what ml_dtypes calls infinite or NaN is exactly what is refused."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(source)
    x = x[torch.isfinite(x)]
    want = x.float().numpy().astype(numpy_type)
    fits = np.isfinite(want.astype(np.float32))
    y, _ = cast(x[torch.from_numpy(fits)], fmt)
    np.testing.assert_array_equal(bits(y), bits(want[fits]))
    torch_type = getattr(torch, fmt.torch_name)
    np.testing.assert_array_equal(bits(y), bits(x.to(torch_type)[torch.from_numpy(fits)]))
    with pytest.raises(RequestError, match=f"got: {int((~fits).sum())} of {len(x)},"):
        cast(x, fmt)


@both
def test_every_value_halfway_between_neighbours(fmt, numpy_type):
    """Subnormal ones too: the tie goes to even, and the next fp32 on each side to its side."""
    at = np.arange(fmt.top, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    low, high = (p.view(numpy_type).astype(np.float64) for p in (at, at + at.dtype.type(1)))
    tie = torch.from_numpy((low + high) / 2)
    for x in (tie, tie.float()) if fmt != BF16 else (tie,):
        np.testing.assert_array_equal(bits(cast(x, fmt)[0]), at + at % 2)
        above = torch.nextafter(x, torch.full_like(x, torch.inf))
        np.testing.assert_array_equal(bits(cast(above, fmt)[0]), at + 1)
        np.testing.assert_array_equal(bits(cast(torch.nextafter(x, x * 0), fmt)[0]), at)


@both
def test_ties_go_to_even(fmt, numpy_type):
    """Exactly between every two neighbours in [1, 2]."""
    step = 2.0**-fmt.mantissa
    x = 1 + (torch.arange(2**fmt.mantissa) + 0.5) * step
    y, _ = cast(x, fmt)
    assert (bits(y) % 2 == 0).all()
    np.testing.assert_array_equal(bits(y), bits(x.numpy().astype(numpy_type)))


@both
def test_float64_is_rounded_once(fmt, numpy_type):
    """Just above a tie: rounding to fp32 on the way would turn it into the tie and lose it."""
    step = 2.0**-fmt.mantissa
    x = torch.tensor([1 + step / 2 + 2.0**-40, -1 - step / 2 - 2.0**-40], dtype=torch.float64)
    assert cast(x, fmt)[0].float().tolist() == [1 + step, -1 - step]


def test_fp32_is_kept():
    x = torch.randn(5)
    y, loss = cast(x, FP32)
    assert torch.equal(x, y)
    assert loss == CastLoss(0, 0)


def test_overflow_is_refused():
    x = torch.tensor([1.0, 70000.0, -1e30])
    with pytest.raises(RequestError, match="too large for fp16") as error:
        cast(x, FP16, name="head.weight")
    assert error.value.exit_code == 7
    assert error.value.where == "head.weight"
    assert "2 of 3" in str(error.value)
    assert "65504" in str(error.value)
    assert "bf16" in error.value.fix


@pytest.mark.parametrize(
    ("fmt", "value", "fits"),
    [
        (FP16, 65504.0, True),
        (FP16, 65519.0, True),
        (FP16, 65520.0, False),
        (FP8_E4M3, 464.0, True),  # a tie: 448 is even
        (FP8_E4M3, 464.0001, False),
        (FP8_E5M2, 61439.0, True),
        (FP8_E5M2, 61440.0, False),  # a tie: 57344 is odd
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_overflow_starts_half_a_step_above_the_largest(fmt, value, fits, dtype):
    x = torch.tensor([value, -value], dtype=dtype)
    if fits:
        assert cast(x, fmt)[0].float().tolist() == [fmt.max, -fmt.max]
    else:
        with pytest.raises(RequestError, match=f"2 of 2.*at most {fmt.max:g}"):
            cast(x, fmt)


@pytest.mark.parametrize("fmt", [FP4_E2M1, E8M0], ids=str)
def test_formats_of_scaled_values_are_not_cast_to(fmt):
    with pytest.raises(TypeError, match=str(fmt)):
        cast(torch.ones(2), fmt)


@both
def test_empty(fmt, numpy_type):
    y, loss = cast(torch.empty(0, 3), fmt)
    assert (y.shape, loss) == ((0, 3), CastLoss(0, 0))


def test_underflow_is_counted():
    x = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 2.0**-24, 1.0])
    y, loss = cast(x, FP16)
    assert loss == CastLoss(overflow=0, underflow=2, max_error=float(x[2]))
    assert y.tolist() == [0, 0, 0, 0, 2.0**-24, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    with pytest.raises(InputError, match="not finite"):
        cast(torch.tensor([1.0, bad]), BF16)


def test_input_is_not_modified():
    x = torch.randn(7)
    before = x.clone()
    cast(x, BF16)[0].zero_()
    assert torch.equal(x, before)
