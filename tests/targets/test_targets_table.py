"""The table of targets: what each can express is decided before any work is done."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qkit.errors import RequestError, UsageError
from qkit.spec import PRESETS, Codebook, PerChannel, QSpec, Scheme, parse
from qkit.targets import TARGETS, check, targets_of

# Floats of 8 bits and less.


@pytest.mark.parametrize(
    "scheme",
    [
        *PRESETS,
        *("w1a16-asym", "w7a16-tensor", "w3a16-g5-asym", "int4wo"),
        *("int8", "w4a4", "w8a8-asym", "w3a8-tensor", "w4a8-g32-static"),
        *("nf4-g32", "nf4-channel"),
    ],
)
def test_torch_takes_integers_codebooks_and_casts(scheme):
    check("torch", parse(scheme))
    assert "torch" in targets_of(parse(scheme))


def test_torch_takes_any_codebook_with_exact_activations():
    book = QSpec(Codebook("learnt", (-1.0, 0.25, 2.0)), PerChannel(0))
    check("torch", Scheme(book))
    with pytest.raises(RequestError) as caught:
        check("torch", Scheme(book, parse("w8a8").input))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("scheme", ["nf4", "fp8", "fp8-channel", "mxfp4"])
def test_tables_are_not_multiplied_with_quantized_activations(scheme):
    wanted = Scheme(parse(scheme).weight, parse("w8a8").input)
    with pytest.raises(RequestError, match="with quantized activations") as caught:
        check("torch", wanted)
    assert caught.value.exit_code == 7
    assert targets_of(wanted) == []
    assert parse(caught.value.fix.partition("--scheme ")[2].split()[0]) == parse(scheme)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a8-g32"])
def test_quantized_outputs_are_refused_and_the_same_layer_without_them_is_named(scheme):
    wanted = parse(scheme)
    with pytest.raises(RequestError, match="quantized outputs") as caught:
        check("torch", replace(wanted, output=wanted.input))
    assert caught.value.exit_code == 7
    instead = caught.value.fix.partition("--scheme ")[2].split()[0]
    check("torch", parse(instead))
    assert parse(instead) == wanted


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


@pytest.mark.parametrize(
    ("scheme", "expressed"),
    [
        *((name, True) for name in ("int8-static", "int8-dynamic", "w4a16-g32", "w8a16-g128-asym")),
        *((name, False) for name in ("w8a16", "w4a8-g32", "w8a8-asym", "w4a16-g24", "nf4", "fp16")),
    ],
)
def test_onnx_takes_int8_activations_and_weights_in_blocks(scheme, expressed):
    assert ("onnx" in targets_of(parse(scheme))) == expressed
    if not expressed:
        with pytest.raises(RequestError, match="no kernels for this scheme") as caught:
            check("onnx", parse(scheme))
        assert caught.value.exit_code == 7
