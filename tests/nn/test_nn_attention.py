"""Opened attention gives what ``nn.MultiheadAttention`` gives, and torch's layers call it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qkit import ops
from qkit.nn import Opened, QLayer, open_modules, opening, survey, swap
from qkit.nn.attention import OpenAttention

# From the float reference, whose fused path makes one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
]
EPS = torch.finfo(torch.float32).eps


def assert_same(got: Any, want: Any) -> None:
    """Sums of less than 40 products of values of about 1, four in a row, in other orders."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            bound = 256 * EPS * max(1, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


@st.composite
def cases(draw) -> tuple[nn.MultiheadAttention, tuple, dict]:
    """A module and the arguments of a call."""
    flag = st.booleans()
    heads, size = draw(st.sampled_from([(1, 3), (2, 4), (3, 3), (4, 1)]))
    width = heads * size
    kdim, vdim = (draw(st.sampled_from([None, None, 5])) for _ in range(2))
    options = {name: draw(flag) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    torch.manual_seed(draw(st.integers(0, 99)))
    module = nn.MultiheadAttention(
        width, heads, dropout=0.2, kdim=kdim, vdim=vdim, **options
    ).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    batch = draw(st.sampled_from([None, 1, 3]))
    length, source = draw(st.integers(1, 5)), draw(st.integers(1, 7))

    def tensor(rows: int, columns: int) -> torch.Tensor:
        if batch is None:
            return torch.randn(rows, columns)
        shape = (batch, rows) if module.batch_first else (rows, batch)
        return torch.randn(*shape, columns)

    query = tensor(length, width)
    form = draw(st.sampled_from(["self", "cross", "three"]))
    if form == "self" and kdim is None and vdim is None:
        query, source = (key := tensor(source, width)), source
        length, value = source, key
    else:
        key, value = tensor(source, module.kdim), tensor(source, module.vdim)
        value = key if form == "cross" and module.kdim == module.vdim else value
    call: dict[str, Any] = {name: draw(flag) for name in ("need_weights", "average_attn_weights")}
    floats = draw(flag)
    if draw(flag):
        # A position that sees nothing has no defined result; everyone sees the first.
        hidden = torch.rand(*(() if batch is None else (batch,)), source) < 0.3
        hidden[..., 0] = False
        call["key_padding_mask"] = torch.where(hidden, -torch.inf, 0.5) if floats else hidden
    if draw(flag):
        rows = () if draw(flag) else ((batch or 1) * heads,)
        hidden = torch.rand(*rows, length, source) < 0.3
        hidden[..., 0] = False
        call["attn_mask"] = torch.where(hidden, -torch.inf, 0.25) if floats else hidden
    elif draw(flag) and length == source:
        call["attn_mask"] = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        # torch refuses the hint where the keys are longer than the mask says
        call["is_causal"] = not (module.bias_k is not None or module.add_zero_attn)
    return module, (query, key, value), call


@settings(max_examples=200)
@given(cases())
def test_an_opened_module_gives_what_the_original_gives(case):
    module, args, call = case
    form = opening(module)
    assert form is not None
    assert form.kind == "MultiheadAttention"
    for grad in (True, False):  # without gradients, torch takes its fused path
        with torch.set_grad_enabled(grad):
            assert_same(form.module(*args, **call), module(*args, **call))


def test_the_layers_hold_the_parameters_themselves():
    for module in (
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
    ):
        opened = opening(module).module
        assert {id(p) for p in opened.parameters()} == {id(p) for p in module.parameters()}
        assert type(opened.out_proj) is nn.Linear


def test_dropout_is_of_the_weights_and_only_in_training():
    module = nn.MultiheadAttention(8, 2, dropout=0.5)
    opened, x = opening(module).module, torch.randn(3, 2, 8)
    torch.manual_seed(1)
    want = module(x, x, x)
    torch.manual_seed(1)
    assert_same([t.detach() for t in opened(x, x, x)], [t.detach() for t in want])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"is_causal": True}, "attn_mask is needed"),
        ({"attn_mask": torch.zeros(3, 4)}, r"expected attn_mask \(3, 3\)"),
        ({"attn_mask": torch.zeros(3, 3, 3)}, r"expected attn_mask \(4, 3, 3\)"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.int32)}, "bool or float"),
        ({"key_padding_mask": torch.zeros(3, 2)}, r"expected key_padding_mask \(2, 3\)"),
    ],
    ids=str,
)
def test_wrong_masks(call, message):
    x = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match=message):
        opening(nn.MultiheadAttention(4, 2)).module(x, x, x, **call)


def test_wrong_dimensions():
    x = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="2-D or 3-D alike"):
        opening(nn.MultiheadAttention(4, 2)).module(x, x[0], x[0])


def test_an_out_proj_of_another_class_keeps_it_closed():
    class Scaled(nn.Linear):
        pass

    module = nn.MultiheadAttention(4, 2)
    module.out_proj = Scaled(4, 4)
    assert opening(module) is None
    reasons = {entry.name: entry.reason for entry in survey(module)}
    assert reasons[""] == "an opened MultiheadAttention would lack its out_proj"
    assert "subclass of Linear" in reasons["out_proj"]


# torch's transformers


def _encoder(**options: Any) -> tuple[nn.Module, tuple, dict]:
    options = {"dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(12, 2, 20, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    return encoder, (torch.randn(2, 5, 12),), {"src_key_padding_mask": hidden}


def _decoder(**options: Any) -> tuple[nn.Module, tuple, dict]:
    layer = nn.TransformerDecoderLayer(12, 3, 20, dropout=0.0, batch_first=True, **options)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    args = (torch.randn(2, 4, 12), torch.randn(2, 5, 12))
    return nn.TransformerDecoder(layer, 2), args, {"tgt_mask": mask, "tgt_is_causal": True}


def _transformer() -> tuple[nn.Module, tuple, dict]:
    model = nn.Transformer(12, 2, 2, 2, 20, dropout=0.0, batch_first=True)
    return model, (torch.randn(2, 5, 12), torch.randn(2, 4, 12)), {}


TRANSFORMERS = {
    "encoder": _encoder,
    "encoder, norm first": lambda: _encoder(norm_first=True),
    "encoder, no bias": lambda: _encoder(bias=False),
    "decoder": _decoder,
    "decoder, gelu": lambda: _decoder(activation="gelu"),
    "transformer": _transformer,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformers_call_every_quantized_layer(name, grad, quantized):
    model, args, call = TRANSFORMERS[name]()
    reference = copy.deepcopy(model.eval())
    entries = [entry for entry in survey(model) if entry.reason is None]
    opened = dict.fromkeys(entry.inside for entry in entries if entry.opens)
    new = {entry.name: quantized(entry.module, "w8a16") for entry in entries}
    for entry in survey(reference):  # the parameters of what can be opened are its own
        if entry.name in new:
            entry.module.weight.data.copy_(new[entry.name].weight)
    swap(open_modules(model, opened), new)
    layers = [m for m in model.modules() if isinstance(m, QLayer)]
    attentions = [m for m in model.modules() if isinstance(m, OpenAttention)]
    cross = sum("multihead_attn" in n and n.endswith("in_proj_weight") for n in new)
    assert len(attentions) == len(opened) > 0
    with torch.set_grad_enabled(grad):
        with ops.count_calls() as calls:
            got = model(*args, **call)
        want = reference(*args, **call)
    # In cross-attention the fused projection is called for the queries and for the keys.
    assert sum(calls.values()) == len(layers) + cross
    if "src_key_padding_mask" in call:  # the fused path writes zeros there
        shown = ~call["src_key_padding_mask"]
        got, want = got[shown], want[shown]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
def test_an_opened_transformer_is_still_the_float_one(name):
    model, args, call = TRANSFORMERS[name]()
    model = model.eval()
    opened = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    open_modules(opened, names)
    assert sum(isinstance(m, Opened) for m in opened.modules()) == len(names) > 0
    with torch.no_grad():
        got, want = opened(*args, **call), model(*args, **call)
    if "src_key_padding_mask" in call:  # the fused path writes zeros there
        shown = ~call["src_key_padding_mask"]
        got, want = got[shown], want[shown]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_torch_export_and_compile():
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    opened, x = opening(module).module.eval(), torch.randn(3, 5, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"query": {0: batch}, "key": {0: batch}, "value": {0: batch}}
    program = torch.export.export(opened, (x, x, x), dynamic_shapes=shapes).module()
    compiled = torch.compile(opened, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        want = module(x, x, x)
        assert_same(program(x, x, x), want)
        assert_same(compiled(x, x, x), want)
