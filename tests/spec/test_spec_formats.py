"""Number formats: derived ranges, and the combinations that mean nothing."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from qkit.errors import UsageError
from qkit.spec import (
    BF16,
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP12_E5M6,
    FP16,
    FP32,
    NF4,
    Codebook,
    Float,
    Int,
)
from qkit.spec.formats import format_from_json, format_to_json

INTS = [
    *(Int(bits) for bits in range(1, 9)),
    *(Int(bits, signed=False) for bits in range(1, 9)),
    *(Int(bits, narrow=True) for bits in range(2, 9)),
]
RANGES = {
    Int(8): (-128, 127),
    Int(8, narrow=True): (-127, 127),
    Int(8, signed=False): (0, 255),
    Int(4): (-8, 7),
    Int(4, narrow=True): (-7, 7),
    Int(2, narrow=True): (-1, 1),
    Int(1): (-1, 0),
    Int(1, signed=False): (0, 1),
}


@pytest.mark.parametrize(("fmt", "limits"), RANGES.items(), ids=str)
def test_range_of_an_integer_format(fmt, limits):
    assert (fmt.qmin, fmt.qmax) == limits


@pytest.mark.parametrize("fmt", INTS, ids=repr)
def test_an_integer_format_has_as_many_codes_as_its_bits_allow(fmt):
    assert fmt.qmax - fmt.qmin + 1 == 2**fmt.bits - fmt.narrow
    assert fmt.qmin <= 0 <= fmt.qmax


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="1 to 8 bits"):
        Int(bits)


def test_only_a_signed_format_can_be_narrow():
    with pytest.raises(UsageError, match="signed"):
        Int(4, signed=False, narrow=True)


def test_a_narrow_one_bit_format_has_no_code_but_zero():
    with pytest.raises(UsageError, match="w1a16-asym"):
        Int(1, narrow=True)


@pytest.mark.parametrize(
    ("fmt", "name", "torch_name", "bits"),
    [
        (FP16, "fp16", "float16", 16),
        (BF16, "bf16", "bfloat16", 16),
        (FP32, "fp32", "float32", 32),
        (FP8_E4M3, "fp8-e4m3", "float8_e4m3fn", 8),
        (FP8_E5M2, "fp8-e5m2", "float8_e5m2", 8),
        (E8M0, "e8m0", "float8_e8m0fnu", 8),
    ],
    ids=["fp16", "bf16", "fp32", "fp8-e4m3", "fp8-e5m2", "e8m0"],
)
def test_float_formats(fmt, name, torch_name, bits):
    assert (str(fmt), fmt.torch_name, fmt.bits) == (name, torch_name, bits)


def test_unknown_float_formats_are_refused():
    with pytest.raises(UsageError, match="fp16, bf16, fp32, fp8-e4m3"):
        Float(4, 4)


# greatest value, smallest positive value, its exponent at the top, infinity?, NaN?
FLOATS = {
    FP16: (65504.0, 2.0**-24, 15, True, True),
    BF16: (2.0**127 * (2 - 2**-7), 2.0**-133, 127, True, True),
    FP32: (2.0**127 * (2 - 2**-23), 2.0**-149, 127, True, True),
    FP8_E4M3: (448.0, 2.0**-9, 8, False, True),
    FP8_E5M2: (57344.0, 2.0**-16, 15, True, True),
    FP4_E2M1: (6.0, 0.5, 2, False, False),
    E8M0: (2.0**127, 2.0**-127, 127, False, True),
    FP12_E5M6: (65024.0, 2.0**-20, 15, True, True),
}


@pytest.mark.parametrize(("fmt", "facts"), FLOATS.items(), ids=str)
def test_facts_of_the_specifications(fmt, facts):
    assert (fmt.max, fmt.smallest, fmt.emax, fmt.has_inf, fmt.has_nan) == facts


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2, FP4_E2M1], ids=str)
def test_positive_values_ascend_with_their_patterns(fmt):
    values = [fmt.value(pattern) for pattern in range(fmt.top + 1)]
    assert values == sorted(set(values))
    assert [-v for v in values] == [fmt.value(p | 1 << (fmt.bits - 1)) for p in range(len(values))]


@pytest.mark.parametrize("fmt", [FP16, BF16, FP8_E5M2], ids=str)
def test_the_patterns_above_the_greatest_are_infinity_and_nan(fmt):
    assert fmt.value(fmt.top + 1) == math.inf
    assert fmt.value(fmt.top + 1 | 1 << (fmt.bits - 1)) == -math.inf
    assert math.isnan(fmt.value(fmt.top + 2))


def test_fp8_e4m3_has_one_nan_for_each_sign_and_fp4_none():
    assert [math.isnan(FP8_E4M3.value(p)) for p in range(256)].count(True) == 2
    assert all(math.isfinite(FP4_E2M1.value(p)) for p in range(16))
    assert math.isnan(E8M0.value(255))


def test_torch_has_no_type_of_one_fp4_value():
    with pytest.raises(TypeError, match="fp4-e2m1"):
        _ = FP4_E2M1.torch_name


def test_nf4_is_that_of_qlora():
    """Appendix E: seven quantiles below zero, zero, eight above, and both ends at 1."""
    assert len(NF4.entries) == 16
    assert (NF4.bits, NF4.max, str(NF4)) == (4, 1.0, "nf4")
    assert (NF4.entries[0], NF4.entries[7], NF4.entries[15]) == (-1.0, 0.0, 1.0)
    normal, ends = NormalDist(), 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32
    for place in range(16):
        steps, side = (7, 7 - place) if place < 7 else (8, place - 7)
        quantile = normal.inv_cdf(0.5 + (ends - 0.5) * side / steps) / normal.inv_cdf(ends)
        assert abs(abs(NF4.entries[place]) - quantile) < 1e-4


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("", (0, 1), "has a name"),
        ("one", (0,), "2 to 256"),
        ("many", range(257), "2 to 256"),
        ("same", (0, 1, 1), "ascend"),
        ("down", (1, 0), "ascend"),
        ("nan", (0, math.nan), "finite"),
        ("inf", (0, math.inf), "finite"),
    ],
    ids=lambda value: value if isinstance(value, str) and value else None,
)
def test_impossible_codebooks_are_refused(name, entries, message):
    with pytest.raises(UsageError, match=message):
        Codebook(name, tuple(entries))


@pytest.mark.parametrize(("n", "bits"), [(2, 1), (3, 2), (16, 4), (17, 5), (256, 8)])
def test_bits_of_a_codebook(n, bits):
    assert Codebook("some", range(n)).bits == bits


@pytest.mark.parametrize("fmt", [*INTS, *FLOATS, NF4, Codebook("odd", (-3, 0.5))], ids=repr)
def test_json_round_trip(fmt):
    assert format_from_json(format_to_json(fmt)) == fmt
