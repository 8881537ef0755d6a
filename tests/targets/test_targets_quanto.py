"""Folders of optimum-quanto, read by qkit: quanto itself writes them and says what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum.quanto import MaxOptimizer, freeze, quantization_map, quantize, quantize_weight
from optimum.quanto import qtypes as QTYPES
from optimum.quanto.library.extensions import cpp
from safetensors.torch import load_file, save_file
from torch import nn

import qkit
from qkit.errors import InputError, UsageError
from qkit.nn import QConv2d, QLayer, QLinear
from qkit.numerics import QTensor, dequantize
from qkit.targets.quanto import TYPES, from_quanto

# Sums in another order: fp32's unit in the last place, some hundred times.
AGREEMENT = 1e-5


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """quanto's unpacking in Python; the same in C++ takes a minute to compile."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.quanto.unpack.default._op_dk(key, packed, bits)


@pytest.fixture(autouse=True, scope="module")
def _no_compiler():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
        yield


def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that quanto stores for a quantized weight."""
    state: dict[str, torch.Tensor] = {}
    weight.save_to_state_dict(state, "", False)
    return state


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([*TYPES]),
    rows=st.sampled_from([1, 2, 3, 7, 31, 33]),
    columns=st.sampled_from([1, 3, 31, 64, 96]),
    group=st.sampled_from([None, 32]),
    zeropoint=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_every_weight_is_the_one_quanto_dequantizes(
    kind, rows, columns, group, zeropoint, dtype, seed
):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    qtype = QTYPES[kind]
    if qtype.bits == 8:
        amax = x.abs().amax(1, keepdim=True) if rows > 1 else x.abs().max()
        weight = quantize_weight(x, qtype, 0, scale=(amax / qtype.qmax).clamp(min=1e-4))
        exact = True
    else:
        size = None if group is None or columns % group or columns == group else group
        scale, shift = MaxOptimizer()(x, qtype, 0, size, zeropoint)
        weight = quantize_weight(x, qtype, 0, scale, shift, size, optimized=False)
        exact = zeropoint and (rows > 1 or columns == 1 or size is not None)
    got = from_quanto(parts(weight), kind, (rows, columns), name="w")
    want = weight.dequantize()
    assert isinstance(got, QTensor) == exact
    if exact:
        # quanto rounds the product to the dtype of the scale; qkit computes it in fp32.
        assert got.qparams.scale.dtype == dtype
        got = dequantize(got).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Flatten(), nn.LayerNorm(45), nn.Linear(45, 160), nn.Linear(160, 1)
    ).eval()


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def write(folder: Path, kind: str, *, name: str = "quantization_map.json", **options) -> nn.Module:
    """``net()`` quantized and saved as quanto's README says; the model in memory."""
    model = net()
    quantize(model, weights=kind, **options)
    freeze(model)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / name).write_text(json.dumps(quantization_map(model)))
    return model


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2"])
def test_a_folder_gives_the_outputs_of_quanto(kind, tmp_path):
    want = write(tmp_path, kind)(X)
    if kind in ("qint8", "qfloat8"):
        model = qkit.load(tmp_path, into=net)
        assert [type(model[i]) for i in (0, 3, 4)] == [QConv2d, QLinear, QLinear]
        if kind == "qint8":
            stored = load_file(tmp_path / "model.safetensors")["3.weight._data"]
            assert torch.equal(model[3].weight_codes, stored)
    else:
        with pytest.warns(UserWarning, match="3 of 3 quantized layers .* are held in float"):
            model = qkit.load(tmp_path, into=net)
    with torch.no_grad():
        error = (model(X) - want).abs().max() / want.abs().max()
    assert float(error) <= AGREEMENT


def test_layers_that_were_left_out(tmp_path):
    want = write(tmp_path, "qint8", exclude="3", name="quanto_qmap.json")(X)
    model = qkit.load(tmp_path, into=net())
    assert [isinstance(layer, QLayer) for layer in model] == [True, False, False, False, True]
    with torch.no_grad():
        assert torch.allclose(model(X), want, rtol=AGREEMENT, atol=AGREEMENT)


def change_map(folder: Path, **layers: object) -> None:
    path = folder / "quantization_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | layers))


def test_what_is_refused(tmp_path):
    write(tmp_path, "qint8")
    with pytest.raises(UsageError, match="does not carry its architecture"):
        qkit.load(tmp_path)
    with pytest.raises(InputError, match=r"quantized already.*qkit\.load reads"):
        qkit.inspect(tmp_path)
    change_map(tmp_path, **{"3": {"weights": "qint8", "activations": "qint8"}})
    with pytest.raises(InputError, match="whose activations optimum-quanto quantizes"):
        qkit.load(tmp_path, into=net)
    change_map(tmp_path, **{"3": {"weights": "qint3", "activations": "none"}})
    with pytest.raises(InputError, match=r"unknown type of a weight.*qint3"):
        qkit.load(tmp_path, into=net)
    change_map(tmp_path, **{"3": {"weights": "qfloat8_e5m2", "activations": "none"}})
    with pytest.raises(InputError, match=r"not those of the type.*torch\.int8 data"):
        qkit.load(tmp_path, into=net)
    change_map(tmp_path, **{"3": {"weights": "qint4", "activations": "none"}})
    with pytest.raises(InputError, match=r"lacks '_data\._data'"):
        qkit.load(tmp_path, into=net)
    change_map(tmp_path, **{"3": ["qint8"]})
    with pytest.raises(InputError, match="layer 3"):
        qkit.load(tmp_path, into=net)
    for text, message in (("[1]", "is no table"), ("{", "is corrupt")):
        (tmp_path / "quantization_map.json").write_text(text)
        with pytest.raises(InputError, match=message):
            qkit.load(tmp_path, into=net)


def test_another_architecture_is_refused(tmp_path):
    write(tmp_path, "qint8")
    with pytest.raises(InputError, match="do not fit the layer"):
        qkit.load(tmp_path, into=lambda: nn.Sequential(*list(net())[:3], nn.Linear(45, 161)))
    with pytest.raises(InputError, match="no layer '4' with a weight"):
        qkit.load(tmp_path, into=lambda: nn.Sequential(*list(net())[:4]))


def test_an_fp8_weight_with_nan_is_refused():
    data = torch.full((3, 4), float("nan")).to(torch.float8_e4m3fn)
    stored = {"_data": data, "_scale": torch.ones(3, 1)}
    with pytest.raises(InputError, match=r"not finite.*12 values"):
        from_quanto(stored, "qfloat8_e4m3fn", (3, 4), name="w")


@pytest.mark.parametrize("shape", [(4, 4), (2, 8)])
def test_packed_codes_of_another_number_are_refused(shape):
    stored = {
        "_data._data": torch.zeros(2, 4, dtype=torch.uint8),
        "_scale": torch.ones(3, 1),
        "_shift": torch.ones(3, 1),
    }
    with pytest.raises(InputError, match="do not fit the layer"):
        from_quanto(stored, "qint4", shape, name="w")
