"""The compressed-tensors layout: its own library decompresses to the same bits."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from qkit.errors import InputError, MissingExtraError, RequestError, UsageError
from qkit.nn import survey
from qkit.numerics import choose_qparams, dequantize, quantize
from qkit.spec import BF16, FP16, FP32, Recipe, parse
from qkit.targets import COMPRESSED, check_format
from qkit.targets.artifact import LayerFacts
from qkit.targets.compressed_tensors import (
    as_stored,
    from_format,
    layer_obstacle,
    layout,
    quantization_config,
    to_format,
)


def schemes() -> st.SearchStrategy[str]:
    weights = st.builds(
        "w{}a16-{}{}".format,
        st.integers(1, 8),
        st.sampled_from(["channel", "tensor", "g1", "g8", "g32"]),
        st.sampled_from(["", "-asym"]),
    )
    return weights | st.sampled_from(["w8a8", "w8a8-g8", "w8a8-asym", "w8a8-tensor-asym"])


@settings(deadline=None, max_examples=80)
@given(
    name=schemes(),
    rows=st.sampled_from([1, 3, 7, 31, 33]),
    groups=st.integers(1, 4),
    size=st.sampled_from([1e-8, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_the_library_decompresses_to_the_same_bits(name, rows, groups, size, seed):
    scheme = parse(name)
    columns = groups * (scheme.weight.group_size or 7)
    assume(layer_obstacle(survey(nn.Linear(columns, rows))[0], scheme) is None)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    q = quantize(x, choose_qparams(x, scheme.weight), scheme.weight)
    stored = to_format(q, scheme.input)
    wanted = layout((rows, columns), scheme.weight, scheme.input)
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == {
        k: (s.shape, s.dtype) for k, s in wanted.items()
    }
    group = QuantizationScheme(**quantization_config(scheme, [])["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(group.format)
    assert torch.equal(compressor.decompress(stored, group)["weight"], dequantize(q))
    facts = LayerFacts("QLinear", (rows, columns), "float32", scheme.weight, scheme.input)
    back = from_format(stored, facts, name="layer")
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.qparams.scale, q.qparams.scale)
    assert scheme.weight.symmetric or torch.equal(back.qparams.zero_point, q.qparams.zero_point)


@pytest.mark.parametrize("damage", [{"weight_scale": None}, {"weight_packed": torch.zeros(2, 3)}])
def test_tensors_that_do_not_fit_are_refused(damage):
    spec = parse("w4a16-g8").weight
    x = torch.ones(3, 16)
    stored = to_format(quantize(x, choose_qparams(x, spec), spec), None)
    stored = {k: t for k, t in (stored | damage).items() if t is not None}
    with pytest.raises(InputError, match="do not fit"):
        from_format(stored, LayerFacts("QLinear", (3, 16), "float32", spec), name="layer")


def test_layers_that_the_format_lacks():
    model = nn.Sequential(
        nn.Linear(32, 8), nn.Linear(33, 8), nn.Conv2d(32, 4, 1), nn.Linear(32, 8), nn.Linear(64, 8)
    )
    model[3].weight = model[0].weight
    reasons = [layer_obstacle(entry, parse("w4a16-g32")) for entry in survey(model)]
    assert reasons[0] is reasons[4] is None
    assert "no multiple of 32" in reasons[1]
    assert "no quantized Conv2d" in reasons[2]
    assert "shares its weight with 0" in reasons[3]
    assert layer_obstacle(survey(model)[1], parse("w8a16")) is None
    eight, asym = survey(nn.Linear(64, 8))[0], parse("w4a16-g32-asym")
    assert "8 rows or fewer" in layer_obstacle(eight, asym)
    assert layer_obstacle(survey(nn.Linear(64, 9))[0], asym) is None


@pytest.mark.parametrize("name", ["nf4", "fp16", "w8a8-static", "w4a8-g128"])
def test_schemes_that_the_format_lacks(name):
    with pytest.raises(RequestError, match=r"'compressed-tensors' (is not|has)"):
        check_format(COMPRESSED, parse(name))


def test_unknown_formats_and_missing_packages(monkeypatch):
    with pytest.raises(UsageError, match="unknown format"):
        check_format("onnx", parse("w8a16"))
    check_format(COMPRESSED, parse("w8a16"))
    monkeypatch.setattr("qkit.report.package_version", lambda name: None)
    with pytest.raises(MissingExtraError, match="transformers"):
        check_format(COMPRESSED, parse("w8a16"))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, FP16), (torch.bfloat16, BF16), (torch.float32, FP32), (torch.float64, FP32)],
)
def test_scales_are_in_the_dtype_of_the_model(dtype, scale):
    change = as_stored(nn.Linear(2, 2).to(dtype))
    rules = Recipe.simple(parse("w4a16-g32"), ["0"]).with_schemes(change).rules
    assert [r.scheme and r.scheme.weight.scale for r in rules] == [None, scale]
    assert rules[1].scheme.name == "w4a16-g32"
    acts = change(parse("w8a8")).input
    assert (acts.format.qmin, acts.format.qmax, acts.symmetric, acts.scale) == (
        -128,
        127,
        True,
        FP32,
    )
