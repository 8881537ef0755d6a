"""The stored layout: what is promised is what is written, and nothing else is read back."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from oracle import unpack_oracle

from qkit.algorithms import rtn
from qkit.errors import InputError
from qkit.numerics import QTensor
from qkit.packing import Stored, from_tensors, tensor_specs, to_tensors
from qkit.spec import BF16, FP16, Codebook, Int, PerTensor, QSpec, parse

SCHEMES = [
    *(f"w{bits}a16-{kind}" for bits in range(2, 9) for kind in ("channel", "tensor", "g5")),
    *(f"w{bits}a16-{kind}-asym" for bits in range(1, 9) for kind in ("channel", "tensor", "g8")),
    "w4a16-g1",
    "w4a16-g1000",
    *("nf4-channel", "nf4-g5", "mxfp4", "mxfp8-e5m2", "fp8-channel", "fp8-e5m2-g5", "fp8"),
]
SHAPES = {"2d": (5, 33), "4d": (4, 3, 3, 3), "1d": (6,), "empty": (0, 7)}


def example(shape: tuple[int, ...], spec: QSpec) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = weight.reshape(shape[0], math.prod(shape[1:]))
    return rtn(matrix, spec)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip_through_exactly_the_promised_tensors(scheme, shape):
    spec = parse(scheme).weight
    q = example(shape, spec)
    tensors = to_tensors(q, shape)
    assert {k: Stored(tuple(t.shape), t.dtype) for k, t in tensors.items()} == tensor_specs(
        shape, spec
    )
    back = from_tensors(tensors, spec)
    assert back.spec == spec
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.qparams.scale.float(), q.qparams.scale.float())  # also of e8m0
    if spec.symmetric:
        assert back.qparams.zero_point is None
    else:
        assert torch.equal(back.qparams.zero_point, q.qparams.zero_point)


@pytest.mark.parametrize("scale", [FP16, BF16], ids=str)
def test_scales_are_stored_in_their_format(scale):
    spec = replace(parse("w4a16-g8").weight, scale=scale)
    tensors = to_tensors(example((5, 33), spec), (5, 33))
    assert tensor_specs((5, 33), spec)["weight_scale"].dtype == tensors["weight_scale"].dtype
    assert tensors["weight_scale"].dtype == getattr(torch, scale.torch_name)


def test_names_are_those_of_compressed_tensors():
    assert set(tensor_specs((4, 9), parse("w8a16").weight)) == {"weight", "weight_scale"}
    assert set(tensor_specs((4, 9), parse("w4a16-asym").weight)) == {
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
    }


def test_a_codebook_is_stored_with_its_levels():
    for entries, dtype in ((3, torch.int32), (200, torch.uint8)):
        spec = QSpec(Codebook("some", tuple(range(-1, entries - 1))), PerTensor())
        bits = spec.format.bits
        tensors = to_tensors(example((5, 33), spec), (5, 33))
        assert tensors["weight" if bits == 8 else "weight_packed"].dtype == dtype
        filled = [*range(-1, entries - 1), *[0] * (2**bits - entries)]
        assert tensors["weight_levels"].tolist() == filled
        assert torch.equal(from_tensors(tensors, spec).codes, example((5, 33), spec).codes)


def test_a_static_range_is_stored_and_a_dynamic_one_is_not():
    weight, static = parse("w8a8-static").weight, parse("w8a8-static").input
    assert static is not None
    both = tensor_specs((4, 9), weight, static)
    assert both["input_scale"] == Stored((1,), torch.float32)
    assert both["input_zero_point"] == Stored((1,), torch.int8)
    symmetric = replace(static, symmetric=True, format=Int(8, narrow=True))
    assert "input_zero_point" not in tensor_specs((4, 9), weight, symmetric)
    assert tensor_specs((4, 9), weight, parse("w8a8").input) == tensor_specs((4, 9), weight)


@pytest.mark.parametrize("bits", range(2, 8))
def test_packed_rows_are_the_documented_stream(bits):
    q = example((4, 3, 3, 3), parse(f"w{bits}a16-channel").weight)
    packed = to_tensors(q, (4, 3, 3, 3))["weight_packed"]
    assert [unpack_oracle(row, bits, 27) for row in packed.tolist()] == q.codes.tolist()


def test_int8_weights_keep_their_own_shape():
    q = example((4, 3, 3, 3), parse("w8a16").weight)
    stored = to_tensors(q, (4, 3, 3, 3))["weight"]
    assert torch.equal(stored, q.codes.reshape(4, 3, 3, 3))


def damaged() -> dict[str, tuple[str, str, torch.Tensor | None]]:
    """Readable name -> (scheme, key, what to put there: None removes it)."""
    cases: dict[str, tuple[str, str, torch.Tensor | None]] = {}
    for scheme in ("w8a16-asym", "w4a16-g8-asym"):
        for key, good in to_tensors(example((5, 33), parse(scheme).weight), (5, 33)).items():
            other = torch.float64 if good.is_floating_point() else torch.int16
            cases[f"{scheme}-{key}-missing"] = scheme, key, None
            cases[f"{scheme}-{key}-dtype"] = scheme, key, good.to(other)
            cases[f"{scheme}-{key}-longer"] = scheme, key, torch.cat([good, good])
            cases[f"{scheme}-{key}-extra-dim"] = scheme, key, good.unsqueeze(0)
            cases[f"{scheme}-{key}-scalar"] = scheme, key, good.flatten()[0]
            cases[f"{scheme}-{key}-empty"] = scheme, key, good.flatten()[:0]
    shapes = {
        "negative": [-5, -33],
        "zero": [0, 33],
        "swapped": [33, 5],
        "too-wide": [5, 41],
        "too-long": [6, 33],
        "huge": [2**40, 2**40],
    }
    for what, shape in shapes.items():
        cases[f"w4a16-g8-asym-shape-{what}"] = "w4a16-g8-asym", "weight_shape", torch.tensor(shape)
    return cases


DAMAGED = damaged()


@pytest.mark.parametrize(("scheme", "key", "bad"), DAMAGED.values(), ids=DAMAGED)
def test_corrupt_tensors_are_refused(scheme, key, bad):
    spec = parse(scheme).weight
    tensors = to_tensors(example((5, 33), spec), (5, 33))
    if bad is None:
        del tensors[key]
    else:
        tensors[key] = bad
    with pytest.raises(InputError) as error:
        from_tensors(tensors, spec, name="model.layers.3.fc")
    assert error.value.exit_code == 3
    assert error.value.where == "model.layers.3.fc"


def test_no_tensors_at_all_are_refused():
    with pytest.raises(InputError, match="lacks 'weight'"):
        from_tensors({}, parse("w8a16").weight)


def test_a_stray_zero_point_of_a_symmetric_weight_is_not_used():
    spec = parse("w8a16").weight
    tensors = to_tensors(example((5, 33), spec), (5, 33))
    tensors["weight_zero_point"] = torch.full((5, 1), 9, dtype=torch.int8)
    with suppress(InputError):
        assert from_tensors(tensors, spec).qparams.zero_point is None


def test_neither_unsigned_integers_nor_wide_floats_are_stored_as_codes():
    with pytest.raises(TypeError, match="no codes of uint4"):
        tensor_specs((4, 9), QSpec(Int(4, signed=False), PerTensor(), symmetric=False))
    with pytest.raises(TypeError, match="no codes of fp16"):
        tensor_specs((4, 9), QSpec(FP16, PerTensor()))
