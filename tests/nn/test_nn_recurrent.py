"""Opened recurrent modules give what the originals give, over everything that these take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from qkit.nn import opening
from qkit.nn.recurrent import MAX_RECORDED

pytestmark = pytest.mark.filterwarnings(
    "ignore:dropout option adds dropout:UserWarning",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)

EPS = torch.finfo(torch.float32).eps
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN": nn.RNNCell,
    "RNN relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes]
    if isinstance(result, Tensor):
        return [result.detach()]
    return [tensor for part in result for tensor in flat(part)]


def assert_same(got: Any, want: Any, steps: int) -> None:
    """Both sum the same products in other orders, at every step of values in [-1, 1] or so.

    Weights and states are at most about 1, so a gate's sum of ``n`` < 16 terms errs by at most
    ``n * eps``; what a step inherits is passed on with a factor of at most about 1.
    """
    got, want = flat(got), flat(want)
    assert [t.shape for t in got] == [t.shape for t in want]
    for a, b in zip(got, want, strict=True):
        bound = 64 * EPS * max(steps, 1) * max(1.0, float(b.abs().max()))
        assert float((a - b).abs().max()) <= bound


@st.composite
def cases(draw) -> tuple[nn.Module, Any, Any, int]:
    """A module, its input (padded, unbatched or packed), maybe a state, and the steps."""
    name = draw(st.sampled_from(sorted(KINDS)))
    inputs, hidden, layers = (
        draw(st.sampled_from(sizes)) for sizes in ((1, 3, 7), (2, 3, 7), (1, 2, 3))
    )
    project = draw(st.integers(0, hidden - 1)) if name == "LSTM" else 0
    options = {flag: draw(st.booleans()) for flag in ("bias", "batch_first", "bidirectional")}
    options |= {"proj_size": project} if project else {}
    torch.manual_seed(draw(st.integers(0, 99)))
    module = KINDS[name](inputs, hidden, layers, dropout=0.3, **options).eval()
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    form = draw(st.sampled_from(["padded", "unbatched", "packed"]))
    if form == "packed":
        ordered = draw(st.booleans())
        lengths = sorted(lengths, reverse=True) if ordered else lengths
        x: Any = pack_sequence([torch.randn(n, inputs) for n in lengths], enforce_sorted=ordered)
    elif form == "unbatched":
        x = torch.randn(lengths[0], inputs)
    else:
        shape = (len(lengths), lengths[0]) if module.batch_first else (lengths[0], len(lengths))
        x = torch.randn(*shape, inputs)
    count = layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (len(lengths),)
    state: Any = torch.randn(count, *batch, project or hidden)
    if name == "LSTM":
        state = (state, torch.randn(count, *batch, hidden))
    return module, x, state if draw(st.booleans()) else None, layers * max(lengths)


@given(cases())
def test_an_opened_module_gives_what_the_original_gives(case):
    module, x, state, steps = case
    form = opening(module)
    assert form is not None
    assert form.kind == form.module.opened_from == type(module).__name__
    with torch.no_grad():
        assert_same(form.module(x, state), module(x, state), steps)


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, bias, batch, given_state):
    cell = CELLS[name](5, 7, bias=bias)
    opened = opening(cell).module
    shape = () if batch is None else (batch,)
    x, state = torch.randn(*shape, 5), torch.randn(*shape, 7)
    hx = None if not given_state else (state, torch.randn(*shape, 7)) if name == "LSTM" else state
    with torch.no_grad():
        assert_same(opened(x, hx), cell(x, hx), 1)


def test_the_layers_hold_the_parameters_themselves():
    module = nn.LSTM(5, 7, 2, bidirectional=True, proj_size=3)
    opened = opening(module).module
    assert {id(p) for p in opened.parameters()} == {id(p) for p in module.parameters()}
    assert opened.weight_ih_l1_reverse.weight is module.weight_ih_l1_reverse
    assert opened.weight_hh_l0.bias is module.bias_hh_l0
    assert opened.weight_hr_l0.bias is None


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_between_layers_and_only_in_training(training):
    module = nn.GRU(5, 7, 3, dropout=0.5).train(training)
    opened = opening(module).module
    x = torch.randn(4, 3, 5)
    torch.manual_seed(1)
    want = module(x)
    torch.manual_seed(1)
    assert_same(opened(x), want, 12)


def test_gradients_flow():
    module = nn.LSTM(5, 7, 2, batch_first=True)
    opened, x = opening(module).module, torch.randn(3, 4, 5)
    module(x)[0].square().sum().backward()
    want = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    opened(x)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(dtype):
    module = nn.GRU(5, 7, bidirectional=True).to(dtype)
    x = torch.randn(3, 2, 5, dtype=dtype)
    with torch.no_grad():
        for got, want in zip(flat(opening(module).module(x)), flat(module(x)), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, want, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_what_models_call_on_a_recurrent_module():
    opened = opening(nn.LSTM(5, 7, 2, batch_first=True)).module
    opened.flatten_parameters()
    assert (opened.hidden_size, opened.num_layers, opened.batch_first) == (7, 2, True)


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        ((2, 3, 4), None, "expected 5 features, got 4"),
        ((2, 3, 4, 5), None, "2-D or 3-D"),
        ((0, 3, 5), None, "at least one time step"),
        ((2, 3, 5), (1, 2, 7), r"expected a state of shape \(1, 3, 7\)"),
        ((2, 5), (1, 3, 7), r"expected a state of shape \(1, 7\)"),
    ],
)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_wrong_shapes(name, x, hx, message):
    opened = opening(KINDS[name](5, 7)).module
    state = None if hx is None else torch.zeros(hx)
    with pytest.raises(RuntimeError, match=message):
        opened(torch.zeros(x), (state, state) if name == "LSTM" and hx else state)


@pytest.mark.parametrize(("x", "hx"), [((3, 4), None), ((1, 3, 5), None), ((3, 5), (2, 7))])
def test_wrong_shapes_of_cells(x, hx):
    opened = opening(nn.GRUCell(5, 7)).module
    with pytest.raises(RuntimeError, match="expected"):
        opened(torch.zeros(x), None if hx is None else torch.zeros(hx))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torch_export_of_an_opened_module(name, reverse):
    module = KINDS[name](5, 7, 2, bidirectional=reverse, batch_first=True).eval()
    opened, x = opening(module).module.eval(), torch.randn(3, 4, 5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(opened, (x,), dynamic_shapes=({0: batch},)).module()
    for n in (1, 2, 7):
        x = torch.randn(n, 4, 5)
        with torch.no_grad():
            assert_same(program(x), module(x), 8)


def test_torch_export_of_many_steps_is_refused_at_once():
    opened = opening(nn.GRU(5, 7, 2, bidirectional=True, batch_first=True)).module.eval()
    most = MAX_RECORDED // 4
    opened(torch.randn(1, most + 1, 5))
    with pytest.raises(RuntimeError, match=f"{4 * most + 4} steps .* are more than {MAX_RECORDED}"):
        torch.export.export(opened, (torch.randn(1, most + 1, 5),))


def test_torch_compile_of_an_opened_module():
    module = nn.LSTM(5, 7, 2, batch_first=True).eval()
    compiled = torch.compile(opening(module).module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        assert_same(compiled(x), module(x), 8)
