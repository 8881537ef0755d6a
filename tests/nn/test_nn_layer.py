"""What all quantized layers share: stored tensors as buffers, dtypes, copies, export, gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.export import Dim

from qkit import ops
from qkit.nn import QUANTIZED, QLinear
from qkit.packing import tensor_specs, to_tensors
from qkit.spec import BF16, FP16, Int, PerChannel, PerGroup, QSpec, parse

LAYERS = {
    "linear": (lambda **options: nn.Linear(33, 5, **options), (3, 33)),
    "conv2d": (lambda **options: nn.Conv2d(4, 6, 3, padding=1, **options), (2, 4, 7, 6)),
    "conv1d": (lambda **options: nn.Conv1d(4, 6, 3, groups=2, **options), (2, 4, 7)),
    "transposed": (
        lambda **options: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, **options),
        (2, 4, 5, 3),
    ),
}
OPERATORS = {"linear": "qkit::linear"}
SCHEMES = ["w8a16", "w8a16-g8-asym", "w4a16-g8", "w3a16-channel-asym", "w5a16-tensor"]
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.to(torch.float64),
    "there and back": lambda m: m.half().float(),
}

every_kind = pytest.mark.parametrize("kind", LAYERS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def float_layer(kind: str, **options) -> nn.Module:
    return LAYERS[kind][0](**options)


def example(kind: str, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(LAYERS[kind][1]).to(dtype)


def tied(scheme: str, quantized) -> nn.ModuleList:
    """Two linear layers on one weight, quantized as the flows do it."""
    first, second = nn.Linear(33, 5), nn.Linear(33, 5)
    second.weight = first.weight
    new = quantized(first, scheme)
    other = QLinear(second, new.spec)
    other.share_weight(new)
    return nn.ModuleList([new, other])


def assert_tied(pair: nn.ModuleList) -> None:
    first, second = (dict(layer.named_buffers()) for layer in pair)
    assert first.keys() == second.keys()
    assert all(first[name] is second[name] for name in first)


# Parameters, buffers and gradients


@every_kind
@every_scheme
def test_the_weight_is_not_a_parameter(kind, scheme, quantized):
    layer = quantized(float_layer(kind), scheme)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert all(not buffer.requires_grad for buffer in layer.buffers())
    assert not layer.weight.requires_grad


@every_kind
def test_the_bias_is_the_very_parameter(kind, quantized):
    layer = float_layer(kind)
    assert quantized(layer, "w8a16").bias is layer.bias


@every_kind
def test_no_bias_stays_none(kind, quantized):
    layer = quantized(float_layer(kind, bias=False), "w4a16-g8")
    assert layer.bias is None
    assert list(layer.parameters()) == []
    assert "bias" not in layer.state_dict()


@every_kind
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_input_and_bias(kind, scheme, dtype, quantized, reference):
    layer, x = float_layer(kind).to(dtype), example(kind, dtype).requires_grad_()
    exact, x64 = reference(layer, scheme), x.detach().double().requires_grad_()
    new = quantized(layer, scheme)
    new(x).square().sum().backward()
    exact(x64).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.bias.grad.double(), exact.bias.grad, rtol=1e-4, atol=1e-4)


@every_kind
def test_only_the_bias_learns(kind, quantized):
    layer = quantized(float_layer(kind), "w4a16-g8")
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    bias = layer.bias.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(example(kind)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.bias, bias)
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())


# The float view of the weight


@every_kind
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weight_is_the_dequantized_weight(kind, scheme, dtype, quantized, codes, float_weight):
    layer = float_layer(kind).to(dtype)
    want = float_weight(layer, codes(layer, scheme), dtype)
    new = quantized(layer, scheme)
    assert new.weight.dtype == dtype
    assert torch.equal(new.weight, want)


@every_kind
@every_scheme
def test_qtensor_gives_back_what_from_float_took(kind, scheme, codes, quantized):
    layer = float_layer(kind)
    want, got = codes(layer, scheme), quantized(layer, scheme).qtensor()
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.qparams.scale, want.qparams.scale)
    if want.qparams.zero_point is None:
        assert got.qparams.zero_point is None
    else:
        assert torch.equal(got.qparams.zero_point, want.qparams.zero_point)
    assert got.spec == want.spec


# State dicts


@every_kind
@every_scheme
def test_state_dict_is_the_stored_layout(kind, scheme, quantized, codes):
    layer = float_layer(kind)
    shape = tuple(QUANTIZED[type(layer)].rows(layer).shape)
    want = to_tensors(codes(layer, scheme), shape) | {"bias": layer.bias}
    state = quantized(layer, scheme).state_dict()
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@every_scheme
def test_state_dict_names_are_prefixed(scheme, quantized):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(quantized(nn.Linear(9, 5), scheme)))
    names = tensor_specs((5, 9), parse(scheme).weight)
    assert set(model.state_dict()) == {f"1.0.{name}" for name in [*names, "bias"]}


@every_kind
@every_scheme
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_load_state_dict_round_trip(kind, scheme, assign, quantized):
    model = nn.Sequential(quantized(float_layer(kind), scheme))
    other = nn.Sequential(quantized(float_layer(kind), scheme))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = list(state)
    other.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == keys  # the caller's dict is not changed
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    x = example(kind)
    assert torch.equal(other(x), model(x))


@every_kind
@every_scheme
def test_a_missing_tensor_is_refused(kind, scheme, quantized):
    layer = quantized(float_layer(kind), scheme)
    for name in layer.state_dict():
        state = layer.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(
    ("saved", "into", "scheme"),
    [
        (nn.Linear(9, 5), nn.Linear(8, 5), "w8a16"),
        (nn.Linear(9, 5), nn.Linear(9, 6), "w8a16-tensor"),
        (nn.Linear(33, 5), nn.Linear(9, 5), "w4a16-channel"),
        # Nine and ten codes of 4 bits take as many words.
        (nn.Linear(10, 5), nn.Linear(9, 5), "w4a16-channel"),
        # The same number of codes in another shape.
        (nn.Conv2d(2, 3, (1, 4)), nn.Conv2d(2, 3, (4, 1)), "w8a16"),
        (nn.Conv2d(2, 3, (1, 4)), nn.Conv2d(2, 3, (4, 1)), "w4a16-channel"),
    ],
    ids=["columns", "rows", "words", "same-words", "kernel-8", "kernel-4"],
)
def test_a_weight_of_another_shape_is_refused(saved, into, scheme, assign, quantized):
    state = quantized(saved, scheme).state_dict()
    with pytest.raises(RuntimeError, match=r"(?i)size mismatch|shape"):
        quantized(into, scheme).load_state_dict(state, assign=assign)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_float_weight_is_not_taken_for_codes(assign, quantized):
    layer = quantized(nn.Linear(9, 5), "w8a16")
    with pytest.raises(RuntimeError):
        layer.load_state_dict(nn.Linear(9, 5).state_dict(), strict=False, assign=assign)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_scale_of_another_dtype_is_not_rounded(assign, quantized):
    layer = quantized(nn.Linear(9, 5), QSpec(Int(8), PerChannel(0), scale=BF16))
    state = quantized(nn.Linear(9, 5), QSpec(Int(8), PerChannel(0))).state_dict()
    with pytest.raises(RuntimeError, match="bfloat16"):
        layer.load_state_dict(state, assign=assign)


@every_kind
@every_scheme
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_what_is_refused_leaves_the_layer_as_it_was(kind, scheme, assign, quantized):
    layer = quantized(float_layer(kind), scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = quantized(float_layer(kind), scheme).state_dict()
    state["weight_scale"] = state["weight_scale"].double()
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_float_weight_is_unexpected_where_there_are_packed_words(quantized):
    layer = quantized(nn.Linear(9, 5), "w4a16-channel")
    result = layer.load_state_dict(nn.Linear(9, 5).state_dict(), strict=False)
    assert result.unexpected_keys == ["weight"]


# Dtypes and devices


@every_kind
@every_scheme
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_codes_and_scales(kind, scheme, cast, quantized):
    layer = quantized(float_layer(kind), scheme)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model = CASTS[cast](nn.Sequential(layer))
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    want = CASTS[cast](float_layer(kind)).weight.dtype
    assert layer.bias.dtype == layer.weight.dtype == want
    assert model(example(kind, want)).dtype == want


@pytest.mark.parametrize("scale", [BF16, FP16], ids=str)
def test_narrow_scales_survive_a_wider_cast(scale, quantized):
    spec = QSpec(Int(4, narrow=True), PerGroup(8), scale=scale)
    layer = quantized(nn.Linear(33, 5), spec).double().float()
    assert layer.weight_scale.dtype == getattr(torch, scale.torch_name)


def test_a_cast_to_half_and_back_changes_nothing(quantized):
    layer = quantized(nn.Linear(33, 5, bias=False), "w4a16-g8")
    x = torch.randn(3, 33)
    want = layer(x)
    assert torch.equal(layer.half().float()(x), want)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept(training, quantized):
    assert quantized(nn.Linear(9, 5).train(training), "w8a16").training is training


@every_kind
@every_scheme
def test_built_on_the_meta_device(kind, scheme, quantized):
    full = quantized(float_layer(kind), scheme)
    with torch.device("meta"):
        layer = float_layer(kind)
        empty = QUANTIZED[type(layer)](layer, full.spec)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    want = {name: (t.shape, t.dtype) for name, t in full.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == want
    assert empty.to_empty(device="cpu") is empty
    empty.load_state_dict(full.state_dict())
    x = example(kind)
    assert torch.equal(empty(x), full(x))
    assert torch.equal(empty.weight, full.weight)


@every_kind
def test_assigning_to_a_layer_on_the_meta_device(kind, quantized):
    full = quantized(float_layer(kind), "w4a16-g8")
    with torch.device("meta"):
        layer = float_layer(kind)
    empty = QUANTIZED[type(layer)](layer, full.spec)
    empty.load_state_dict(full.state_dict(), assign=True)
    x = example(kind)
    assert torch.equal(empty(x), full(x))


# Copies


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": _saved}


@every_kind
@every_scheme
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_on_its_own_memory(kind, scheme, how, quantized):
    layer = quantized(float_layer(kind), scheme)
    new, x = COPIES[how](layer), example(kind)
    want = layer(x)
    assert torch.equal(new(x), want)
    assert new.spec == layer.spec
    layer.weight_scale.zero_()
    assert torch.equal(new(x), want)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_ties(scheme, how, quantized):
    pair = tied(scheme, quantized)
    assert_tied(pair)
    new = COPIES[how](pair)
    assert_tied(new)
    assert new[0].weight_scale is not pair[0].weight_scale


@pytest.mark.parametrize("scheme", ["w8a16-asym", "w4a16-g8"])
def test_tied_layers_compute_with_one_weight(scheme, quantized):
    first, second = tied(scheme, quantized)
    assert torch.equal(first.weight, second.weight)
    assert first.bias is not second.bias


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_keeps_ties(cast, quantized):
    assert_tied(CASTS[cast](tied("w4a16-g8", quantized)))


# Compilation and export


@every_kind
@every_scheme
def test_compile_without_graph_breaks(kind, scheme, quantized):
    torch.compiler.reset()
    model = nn.Sequential(quantized(float_layer(kind), scheme), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = example(kind)
    torch.testing.assert_close(compiled(x), model(x))


@every_kind
@every_scheme
def test_export_with_a_dynamic_batch(kind, scheme, quantized):
    model = nn.Sequential(quantized(float_layer(kind), scheme), nn.ReLU()).eval()
    x = example(kind)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    for batch in (1, 2, 5):
        x = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(program.module()(x), model(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("qkit.") for name in names)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_export_of_asymmetric_padding(mode, quantized):
    layer = nn.Conv2d(3, 5, (2, 4), padding="same", padding_mode=mode)
    model = quantized(layer, "w4a16-g8").eval()
    program = torch.export.export(
        model, (torch.randn(2, 3, 8, 7),), dynamic_shapes=({0: Dim("batch")},)
    )
    x = torch.randn(5, 3, 8, 7)
    torch.testing.assert_close(program.module()(x), model(x))


@every_kind
def test_the_operator_that_runs_is_counted(kind, quantized):
    layer = quantized(float_layer(kind), "w4a16-g8")
    with ops.count_calls() as calls:
        layer(example(kind))
    assert sum(calls.values()) == 1
    assert all(name.startswith(OPERATORS.get(kind, "qkit::convolution")) for name in calls)


# Reading


@pytest.mark.parametrize(
    ("layer", "scheme", "words"),
    [
        (nn.Linear(33, 5), "w8a16", ["QLinear(", "5x33", "bias=True", "int8", "per-channel"]),
        (nn.Linear(9, 2, False), "w4a16-g8-asym", ["bias=False", "int4 affine", "per-group(8)"]),
        (nn.Conv2d(4, 6, 3), "w4a16-tensor", ["QConv2d(", "6x4x3x3", "int4", "per-tensor"]),
    ],
    ids=["w8", "w4", "conv"],
)
def test_repr(layer, scheme, words, quantized):
    text = repr(quantized(layer, scheme))
    assert all(word in text for word in words), text


def test_group_and_bits_are_readable(quantized):
    layer = quantized(nn.Linear(33, 5), QSpec(Int(3, narrow=True), PerChannel(0)))
    assert (layer.bits, layer.group) == (3, 0)
    assert quantized(nn.Linear(33, 5), "w4a16-g8").group == 8
