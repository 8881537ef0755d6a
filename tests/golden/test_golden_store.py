"""The stored layout does not change by accident: files of an earlier day are still ours."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from golden.make_golden import HERE, SCHEMES, SHAPES, golden_bytes, weight
from oracle import dequantize_oracle, unpack_oracle

from qkit.numerics import dequantize
from qkit.packing import from_tensors
from qkit.spec import parse


def load(scheme: str, layer: str) -> dict[str, torch.Tensor]:
    tensors = safetensors.torch.load_file(HERE / f"{scheme}.safetensors")
    return {k.removeprefix(f"{layer}."): v for k, v in tensors.items() if k.startswith(layer)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_todays_bytes_equal_the_file(scheme):
    assert golden_bytes(scheme) == (HERE / f"{scheme}.safetensors").read_bytes()


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_decodes_to_the_weight(scheme, layer):
    """By qkit, and by the oracle that reads it bit by bit; both within half a step."""
    spec, tensors, want = parse(scheme).weight, load(scheme, layer), weight(SHAPES[layer])
    rows, columns = want.shape[0], want[0].numel()
    if "weight" in tensors:
        codes = tensors["weight"].reshape(rows, columns).numpy()
    else:
        assert tensors["weight_shape"].tolist() == list(want.shape)
        words = tensors["weight_packed"].tolist()
        codes = np.array([unpack_oracle(row, spec.format.bits, columns) for row in words])
    scale, zero = tensors["weight_scale"].double().numpy(), tensors.get("weight_zero_point")
    blocks = spec.granularity.block_shape((rows, columns))
    decoded = dequantize_oracle(codes, scale, None if zero is None else zero.numpy(), blocks)
    ours = dequantize(from_tensors(tensors, spec), torch.float64)
    np.testing.assert_array_equal(ours.numpy(), decoded)
    step = dequantize_oracle(np.ones((rows, columns), int), scale, None, blocks)
    error = np.abs(decoded - want.reshape(rows, columns).double().numpy())
    assert (error <= np.abs(step) * 0.5001).all()


def test_there_is_one_file_for_each_scheme_and_they_are_small():
    files = list(HERE.glob("*.safetensors"))
    assert {file.stem for file in files} == set(SCHEMES)
    assert sum(file.stat().st_size for file in files) < 100_000
