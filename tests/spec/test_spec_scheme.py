"""The grammar of scheme names, and what the names mean."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    PRESETS,
    Codebook,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QSpec,
    Scheme,
    parse,
)
from qkit.spec.scheme import ALIASES


@st.composite
def valid_names(draw: st.DrawFn) -> str:
    """Names of the documented grammar, in any case, with ``-`` or ``_``."""
    bits, act = draw(st.integers(1, 8)), draw(st.sampled_from([4, 8, 16, 32]))
    sizes = st.integers(1, 4096).map("g{}".format)
    kinds = [
        draw(st.one_of(st.none(), sizes, st.sampled_from(["channel", "tensor"]))),
        draw(st.sampled_from([None, "asym"] if bits == 1 else [None, "sym", "asym"])),
        draw(st.sampled_from([None, "dynamic", "static"])) if act < 16 else None,
    ]
    options = draw(st.permutations([kind for kind in kinds if kind]))
    name = draw(st.sampled_from("-_")).join([f"w{bits}a{act}", *options])
    return draw(st.sampled_from([name, name.upper(), f" {name} "]))


@given(valid_names())
def test_the_canonical_name_parses_to_the_same_scheme(name):
    scheme = parse(name)
    assert parse(scheme.name) == scheme
    assert parse(scheme.name).name == scheme.name


@given(valid_names())
def test_json_round_trip(name):
    scheme = parse(name)
    data = json.loads(json.dumps(scheme.to_json()))
    assert data["name"] == scheme.name
    assert Scheme.from_json(data) == scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_canonical(name):
    assert parse(name).name == name


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8", "fp8-e5m2"])
def test_casts_round_trip(name):
    scheme = parse(name)
    assert scheme.weight.is_cast
    assert scheme.casts_model == (not name.startswith("fp8"))
    assert scheme.weight_only == (not scheme.casts_model)
    assert Scheme.from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_parses_in_any_case(alias):
    assert parse(alias) == parse(alias.upper()) == parse(ALIASES[alias])


SAME = {
    "W8A16": "w8a16",
    "w8a16-sym": "w8a16",
    "w8a16-channel": "w8a16",
    "w8a32": "w8a16",
    "w4a16": "w4a16-g128",
    "w4a16_asym": "w4a16-g128-asym",
    "w4a16-asym-g64": "w4a16-g64-asym",
    "w4a16-g1": "w4a16-g1",
    "w4a16-channel": "w4a16-channel",
    "w4a16-tensor": "w4a16-tensor",
    "w8a16-tensor": "w8a16-tensor",
    "w1a16": "w1a16-g128-asym",
    "int8": "w8a8",
    "INT8_static": "w8a8-static",
    "int8-dynamic": "w8a8",
    "int8dq": "w8a8",
    "int8wo": "w8a16",
    "qint8": "w8a16",
    "int4": "w4a16-g128",
    "int4wo-64": "w4a16-g64",
    "int4wo-128": "w4a16-g128",
    "qint4": "w4a16-g128",
    "qint2": "w2a16-g128",
    "W4A16G128": "w4a16-g128",
    "W2A16G64": "w2a16-g64",
    "W4A16G128_asym": "w4a16-g128-asym",
    "w4a4": "w4a4-g128",
    "w8a8-tensor-static": "w8a8-tensor-static",
    "half": "fp16",
    "Float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8-e4m3",
    "FP8_E4M3": "fp8-e4m3",
    "fp8-e5m2": "fp8-e5m2",
    "float8_e4m3fn": "fp8-e4m3",
    "fp8-channel": "fp8-e4m3-channel",
    "fp8-e5m2-tensor": "fp8-e5m2-tensor",
    "fp8-128": "fp8-e4m3-g128",
    "NF4": "nf4-g64",
    "nf4-32": "nf4-g32",
    "nf4-channel": "nf4-channel",
    "MXFP4": "mxfp4-e2m1",
    "mxfp8": "mxfp8-e4m3",
    "mxfp8_e5m2": "mxfp8-e5m2",
}


@pytest.mark.parametrize(("text", "name"), SAME.items(), ids=SAME)
def test_names_of_other_tools(text, name):
    assert parse(text).name == name


# ---------------------------------------------------------------- meaning


def test_w8a16_is_symmetric_per_channel_and_weight_only():
    scheme = parse("w8a16")
    assert scheme == Scheme(QSpec(Int(8, narrow=True), PerChannel(0), True, "weight", FP32))
    assert scheme.weight_only


@pytest.mark.parametrize("bits", range(2, 8))
def test_narrower_weights_have_groups_of_128(bits):
    assert parse(f"w{bits}a16").weight == QSpec(Int(bits), PerGroup(128))


def test_affine_weights_use_every_code():
    assert parse("w4a16-asym").weight.format == Int(4)
    assert parse("w4a16-sym").weight.format == Int(4)


def test_one_bit_weights_are_affine():
    assert parse("w1a16").weight == QSpec(Int(1), PerGroup(128), symmetric=False)
    with pytest.raises(UsageError, match="w1a16-asym"):
        parse("w1a16-sym")


def test_dynamic_activations_are_symmetric_per_token():
    scheme = parse("w8a8")
    assert scheme.input == QSpec(Int(8, narrow=True), PerToken(), True, "dynamic")
    assert parse("w8a8-dynamic") == scheme
    assert not scheme.weight_only


def test_static_activations_are_affine_per_tensor():
    assert parse("w8a8-static").input == QSpec(Int(8), PerTensor(), False, "static")


@pytest.mark.parametrize(
    ("text", "size", "name"),
    [
        ("w4a16", 32, "w4a16-g32"),
        ("w4a16-g128", 32, "w4a16-g32"),
        ("w4a16-g128", -1, "w4a16-channel"),
        ("w8a16", -1, "w8a16"),
        ("w8a16", 64, "w8a16-g64"),
        ("w4a16-tensor-asym", 7, "w4a16-g7-asym"),
        ("int8-static", 16, "w8a8-g16-static"),
    ],
)
def test_group_size_overrides_the_granularity(text, size, name):
    assert parse(text, group_size=size).name == name


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_group_sizes_are_refused(size):
    with pytest.raises(UsageError, match="at least one"):
        parse("w4a16", group_size=size)


@pytest.mark.parametrize("name", ["fp16", "fp8"])
def test_casts_have_no_groups(name):
    with pytest.raises(UsageError, match="no groups"):
        parse(name, group_size=32)


def test_microscaling_has_its_own_groups():
    with pytest.raises(UsageError, match="has 32"):
        parse("mxfp4", group_size=16)


def test_narrow_floats_and_codebooks():
    assert parse("nf4") == Scheme(QSpec(NF4, PerGroup(64)))
    assert parse("nf4", group_size=16) == Scheme(QSpec(NF4, PerGroup(16)))
    assert parse("fp8-channel") == Scheme(QSpec(FP8_E4M3, PerChannel(0)))
    assert parse("fp8-e5m2") == Scheme(QSpec(FP8_E5M2, PerTensor(), scale=None))
    assert parse("mxfp4") == Scheme(QSpec(FP4_E2M1, PerGroup(32), scale=E8M0))
    for name in ("nf4", "fp8-channel", "mxfp4"):
        assert parse(name).weight_only
        assert not parse(name).weight.is_cast


@pytest.mark.parametrize("name", [*SAME.values()])
def test_every_name_round_trips(name):
    scheme = parse(name)
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert parse(scheme.name) == scheme


# ---------------------------------------------------------------- refusals

UNKNOWN = [
    "",
    "-",
    "w9a16",
    "w0a16",
    "w8a7",
    "w8",
    "w8a61",
    "int3x",
    "fp8-e3m4",
    "nf3",
    "nf4-asym",
    "mxfp4-g16",
    "e8m0",
    "w4a16--g32",
    "x-w8a16",
    "w8a8-",
    "w8a16--",
    "w4a16_",
    "-w8a16",
    "int8-",
    "fp16-",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_names_list_the_nearest(text):
    with pytest.raises(UsageError, match="unknown scheme") as error:
        parse(text)
    assert error.value.exit_code == 2
    assert error.value.got == repr(text)
    assert "qkit schemes" in error.value.fix
    for name in error.value.wanted.split(", "):
        parse(name)


def test_the_nearest_name_comes_first():
    with pytest.raises(UsageError) as error:
        parse("w8a61")
    assert error.value.wanted.startswith("w8a16")


REFUSED = {
    "w4a16-g0": "at least one element",
    "w4a16-banana": "unknown option 'banana'",
    "fp16-g32": "unknown scheme",
    "w4a16-g32-g64": "granularity twice",
    "w4a16-g32-tensor": "granularity twice",
    "w4a16-sym-asym": "symmetry twice",
    "w8a8-static-dynamic": "range twice",
    "w8a16-static": "static ranges are for quantized activations",
    "w8a32-dynamic": "dynamic ranges are for quantized activations",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=REFUSED)
def test_contradictions_are_refused(text, message):
    with pytest.raises(UsageError, match=message) as error:
        parse(text)
    assert error.value.exit_code == 2


def test_a_symmetric_range_needs_a_signed_format():
    with pytest.raises(UsageError, match="signed"):
        QSpec(Int(8, signed=False), PerTensor())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSpec(NF4, PerTensor(), symmetric=False), "zero point"),
        (lambda: QSpec(FP8_E4M3, PerTensor(), symmetric=False), "zero point"),
        (lambda: QSpec(NF4, PerTensor(), scale=None), "for floats"),
        (lambda: QSpec(NF4, PerTensor(), scale=E8M0), "for floats"),
        (lambda: QSpec(Int(4), PerTensor(), scale=E8M0), "for floats"),
        (lambda: QSpec(Int(4), PerTensor(), scale=None), "for floats"),
        (lambda: QSpec(Int(4), PerTensor(), scale=FP8_E4M3), "not the format of a scale"),
        (lambda: QSpec(E8M0, PerTensor()), "not cast to this format"),
        (lambda: QSpec(FP4_E2M1, PerTensor(), scale=None), "not cast to this format"),
    ],
)
def test_other_combinations_that_mean_nothing(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("fmt", [NF4, FP8_E4M3, FP4_E2M1, Codebook("odd", (-1, 0.25))], ids=str)
def test_qspec_json_round_trip_of_tables(fmt):
    scale = E8M0 if fmt == FP4_E2M1 else BF16
    spec = QSpec(fmt, PerGroup(7, axis=0), True, "static", scale)
    assert QSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_an_unknown_time_is_refused():
    with pytest.raises(UsageError, match="weight, dynamic, static"):
        QSpec(Int(8), PerTensor(), when="later")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("scale", [FP32, FP16, BF16, FP12_E5M6], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_qspec_json_round_trip(symmetric, scale):
    spec = QSpec(Int(5, narrow=symmetric), PerGroup(7, axis=0), symmetric, "static", scale)
    assert QSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


LONG = {
    "w8a16": "w8a16: weights int8 symmetric (-127..127), per-channel, fp32 scale; activations not "
    "quantized (fp32, bf16 or fp16 in, the same out, summed in fp32)",
    "w8a8-g32-asym": "w8a8-g32-asym: weights int8 affine (-128..127), per-group(32), fp32 scale "
    "and int8 zero point; activations int8 symmetric (-127..127), per-token, fp32 scale, dynamic",
    "bf16": "bf16: every float tensor of the model cast to bf16",
    "fp8": "fp8-e4m3: weights cast to fp8-e4m3; activations not quantized (fp32, bf16 or fp16 in, "
    "the same out, summed in fp32)",
    "nf4": "nf4-g64: weights nf4 (16 entries in -1..1), per-group(64), fp32 scale; activations not "
    "quantized (fp32, bf16 or fp16 in, the same out, summed in fp32)",
    "mxfp4": "mxfp4-e2m1: weights fp4-e2m1 (-6..6), per-group(32), e8m0 scale; activations not "
    "quantized (fp32, bf16 or fp16 in, the same out, summed in fp32)",
}


@pytest.mark.parametrize(("name", "text"), LONG.items(), ids=LONG)
def test_long_form_spells_out_every_choice(name, text):
    assert parse(name).long_form() == text
