"""Names of tensors before and after opening, and what of a state dict is taken for what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qkit.nn import opening, survey, tree
from qkit.nn.names import closed_name, opened_names, opened_state

MODULES = {
    "lstm": lambda: nn.LSTM(5, 7, 2, bidirectional=True),
    "lstm without bias": lambda: nn.LSTM(5, 7, bias=False),
    "lstm with a projection": lambda: nn.LSTM(5, 7, proj_size=3),
    "gru": lambda: nn.GRU(5, 7, 3),
    "rnn": lambda: nn.RNN(5, 7),
    "lstm cell": lambda: nn.LSTMCell(5, 7),
    "gru cell": lambda: nn.GRUCell(5, 7, bias=False),
    "rnn cell": lambda: nn.RNNCell(7, 7),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "attention, no bias": lambda: nn.MultiheadAttention(6, 2, bias=False, add_bias_kv=True),
    "attention, three": lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=7, add_bias_kv=True),
}


@pytest.mark.parametrize("prefix", ["", "body.0"])
@pytest.mark.parametrize("name", MODULES)
def test_a_state_dict_is_opened_as_its_module_is(name, prefix):
    module = MODULES[name]()
    dot = f"{prefix}." if prefix else ""
    state = {dot + key: value for key, value in module.state_dict().items()}
    moved, found = opened_state(state, {})
    assert found == {prefix: type(module).__name__}
    opened = {moved.get(key, key): value for key, value in state.items()}
    want = {dot + key: value for key, value in opening(module).module.state_dict().items()}
    assert opened.keys() == want.keys()
    assert all(opened[key].data_ptr() == want[key].data_ptr() for key in want)
    for old, new in moved.items():
        assert dot + closed_name(new.removeprefix(dot)) == old
    model = tree(state)
    assert model.state_dict().keys() == want.keys()
    inside = [entry for entry in survey(model) if entry.reason is None]
    assert {entry.inside_kind for entry in inside} == {type(module).__name__}
    assert not any(entry.opens for entry in inside)
    assert len(inside) == sum(isinstance(m, nn.Linear) for m in opening(module).module.modules())


def changed(module: nn.Module, change: dict) -> dict[str, torch.Tensor]:
    """The module's state dict with zeros of the shapes in ``change``; None takes one away."""
    state = {name: t for name, t in module.state_dict().items() if change.get(name, ()) is not None}
    return state | {name: torch.zeros(s) for name, s in change.items() if s is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"extra": (3,)},
        {"weight_hh_l0": (28,)},
        {"bias_ih_l0": (28, 1)},
        {"weight_hh_l0": (30, 7)},
        {"weight_hh_l0": (28, 0)},
        {"weight_hh_l0": None},
        {"weight_ih": (28, 5), "weight_hh": (28, 7)},
        {"weight_ih_l0.weight": (2, 2)},
    ],
    ids=str,
)
def test_what_only_looks_like_a_recurrent_module(change):
    state = changed(nn.LSTM(5, 7), change)
    assert opened_state(state, {}) == ({}, {})
    assert tree(state).state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"extra": (3,)},
        {"out_proj.weight": None},
        {"in_proj_weight": (17, 6)},
        {"q_proj_weight": (6, 6)},
    ],
    ids=str,
)
def test_what_only_looks_like_attention(change):
    state = changed(nn.MultiheadAttention(6, 2), change)
    assert opened_state(state, {}) == ({}, {})


@pytest.mark.parametrize(("kind", "opens"), [("LSTM", True), ("Mine", False), ("GRU", False)])
def test_a_known_class_decides(kind, opens):
    state = {f"a.{name}": value for name, value in nn.LSTM(5, 7).state_dict().items()}
    assert bool(opened_state(state, {"a": kind})[1]) == opens


def test_a_known_out_proj_is_a_layer():
    state = {
        f"attn.{name}": value for name, value in nn.MultiheadAttention(6, 2).state_dict().items()
    }
    kinds = {"attn": "MultiheadAttention", "attn.out_proj": "NonDynamicallyQuantizableLinear"}
    assert {e.name: e.reason for e in survey(tree(state, kinds))} == {
        "attn.in_proj_weight": None,
        "attn.out_proj": None,
    }


@given(st.lists(st.sampled_from(["weight", "bias", "weight_ih_l0", "bias_ih_l0", "in_proj_weight",
                                 "in_proj_bias", "bias_k", "scale"]), unique=True))  # fmt: skip
def test_names_come_back(leaves):
    names = opened_names(leaves)
    assert list(names) == leaves
    assert len(set(names.values())) == len(leaves)
    assert [closed_name(name) for name in names.values()] == leaves
