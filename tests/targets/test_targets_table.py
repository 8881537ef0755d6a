"""The table of targets: what each can express is decided before any work is done."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qkit.errors import RequestError, UsageError
from qkit.spec import PRESETS, parse
from qkit.targets import TARGETS, check, targets_of

NARROW = [name for name in PRESETS if name not in ("fp16", "bf16") and name[0] != "w"]
EXPRESSED = [
    name
    for name in PRESETS
    if name not in NARROW and (parse(name).weight_only or parse(name).is_cast)
]
QUANTIZED_ACTIVATIONS = [name for name in PRESETS if name not in EXPRESSED + NARROW]


def test_the_lists_are_what_they_say():
    assert {"w8a16", "w4a16-g128", "w2a16-g128", "fp16", "bf16"} <= set(EXPRESSED)
    assert {"w8a8", "w8a8-static", "w4a8-g128"} == set(QUANTIZED_ACTIVATIONS)


@pytest.mark.parametrize(
    "scheme", [*EXPRESSED, "w1a16-asym", "w7a16-tensor", "w3a16-g5-asym", "int4wo"]
)
def test_torch_takes_weight_only_schemes_and_casts(scheme):
    check("torch", parse(scheme))
    assert "torch" in targets_of(parse(scheme))


@pytest.mark.parametrize("scheme", [*QUANTIZED_ACTIVATIONS, "int8", "w4a4"])
def test_torch_refuses_quantized_activations(scheme):
    with pytest.raises(RequestError) as caught:
        check("torch", parse(scheme))
    assert caught.value.exit_code == 7
    assert parse(scheme).name in str(caught.value)
    assert "torch" not in targets_of(parse(scheme))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("fp8", "cannot run a whole model in fp8-e4m3"),
        ("fp8-e5m2", "cannot run a whole model in fp8-e5m2"),
        ("fp8-channel", "no layers with fp8-e4m3 weights"),
        ("nf4", "no layers with nf4 weights"),
        ("mxfp4", "no layers with fp4-e2m1 weights"),
    ],
)
def test_torch_refuses_narrow_floats_and_codebooks(scheme, message):
    with pytest.raises(RequestError, match=message) as caught:
        check("torch", parse(scheme))
    assert caught.value.exit_code == 7
    assert targets_of(parse(scheme)) == []
    instead = parse(caught.value.fix.partition("--scheme ")[2].split()[0])
    check("torch", instead)
    assert instead.weight.format.bits == parse(scheme).weight.format.bits


@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8",
        "w8a8-static",
        "w4a8",
        "w4a8-g32",
        "w8a8-g128",
        "w4a8-channel",
        "w8a8-asym",
        "w3a8-tensor",
    ],
)
def test_the_refusal_names_a_scheme_with_the_same_weights(scheme):
    with pytest.raises(RequestError) as caught:
        check("torch", parse(scheme))
    instead = caught.value.fix.partition("--scheme ")[2].split()[0]
    check("torch", parse(instead))
    assert parse(instead).weight == parse(scheme).weight


@pytest.mark.parametrize("name", ["torhc", "pytorch", "TORCH", "", "nonsense"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_an_unknown_target(name, scheme):
    with pytest.raises(UsageError, match="unknown target") as caught:
        check(name, parse(scheme))
    assert caught.value.exit_code == 2
    assert "torch" in str(caught.value.wanted)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_complete(name):
    row = TARGETS[name]
    assert row.name == name
    assert row.module.startswith("qkit.targets.")
    assert row.summary
    assert row.extra is None or row.extra


def test_the_table_imports_no_torch():
    code = "import sys, qkit.targets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
