"""GGUF: the blocks are what the gguf package itself reads."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qkit
from qkit.errors import MissingExtraError, RequestError
from qkit.nn import survey
from qkit.numerics import QParams, QTensor, choose_qparams, dequantize, quantize
from qkit.targets.gguf import SCHEMES, layer_obstacle, to_blocks, write_gguf


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(SCHEMES)),
    rows=st.sampled_from([1, 3, 7, 31, 33]),
    groups=st.integers(1, 4),
    size=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_blocks_dequantize_to_the_same_bits(kind, rows, groups, size, seed):
    x = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * size
    spec = SCHEMES[kind].weight
    q = quantize(x, choose_qparams(x, spec), spec)
    read = gguf.dequantize(to_blocks(q), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, dequantize(q).numpy())


def test_every_scale_and_zero_point_of_q4_1_has_a_minimum_in_fp16():
    """All 7-bit significands with all zero points, at both ends of fp16 and in between."""
    spec = SCHEMES["Q4_1"].weight
    significands = torch.arange(64, 128) / 64
    for exponent in (-14, 0, 11):
        scale = (significands * 2.0**exponent).half().reshape(-1, 1)
        for zero in range(-8, 8):
            zeros = torch.full(scale.shape, zero, dtype=torch.int8)
            codes = torch.arange(-16, 16).clamp(-8, 7).to(torch.int8).expand(64, 32)
            q = QTensor(codes, QParams(scale, zeros), spec)
            read = gguf.dequantize(to_blocks(q), gguf.GGMLQuantizationType.Q4_1)
            assert np.array_equal(read, dequantize(q).numpy())


def test_a_minimum_beyond_fp16_is_refused():
    x = torch.linspace(-9e5, 0, 32).reshape(1, 32)
    spec = SCHEMES["Q4_1"].weight
    with pytest.raises(RequestError, match=r"minimum of a block overflows.*layers\.0"):
        to_blocks(quantize(x, choose_qparams(x, spec), spec), name="layers.0")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 33), nn.BatchNorm1d(33), nn.Linear(33, 7))


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_a_model_reads_back_exactly(kind, tmp_path: Path):
    model, _ = qkit.quantize(net().eval(), SCHEMES[kind], latency=False)
    told = write_gguf(model, tmp_path / "net.gguf")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors}
    assert read.keys() == told.keys() == net().state_dict().keys()
    assert read["0.weight"].tensor_type.name == kind
    assert told["2.weight"].startswith("F32: ")  # rows of 33
    for key in ("0", "2"):
        tensor = read[f"{key}.weight"]
        have = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(have, dequantize(model.get_submodule(key).qtensor()).numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["net.gguf"]


def test_layers_without_blocks_are_left_and_said():
    model = nn.Sequential(nn.Linear(64, 3), nn.Linear(33, 7), nn.Conv2d(32, 4, 1))
    reasons = [layer_obstacle(entry, SCHEMES["Q4_0"]) for entry in survey(model)]
    assert reasons[0] is None
    assert "33 columns are no multiple of 32" in reasons[1]
    assert "rows of a matrix" in reasons[2]


def test_scales_that_are_not_fp16_are_written_as_values(tmp_path: Path):
    model, _ = qkit.quantize(net().eval(), "w8a16-g32", latency=False)
    assert write_gguf(model, tmp_path / "net.gguf")["0.weight"].startswith("F32: ")


def test_what_has_no_place_is_refused_and_nothing_is_left(tmp_path: Path):
    with pytest.raises(RequestError, match="1 to 4 dimensions"):
        write_gguf(nn.Conv3d(1, 1, 3), tmp_path / "net.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"qkit-torch\[gguf\]"):
        write_gguf(net(), tmp_path / "net.gguf")
