"""Where training loops put the weights, and what wrappers do to their names."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qkit.models import load


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "weights"])
def test_a_nested_state_dict(mlp, tmp_path, key):
    optimizer = torch.optim.Adam(mlp.parameters())
    checkpoint = {key: mlp.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    loaded = load(tmp_path / "last.ckpt")
    assert loaded.state_dict.keys() == mlp.state_dict().keys()
    assert loaded.source.notes == (f"took the entry {key!r} of the checkpoint",)


def test_a_nested_model(mlp, tmp_path):
    torch.save({"model": mlp, "epoch": 3}, tmp_path / "last.ckpt")
    assert torch.equal(load(tmp_path / "last.ckpt").model[0].weight, mlp[0].weight)


def test_an_unknown_key_is_taken_if_it_is_the_only_one(mlp, tmp_path):
    torch.save({"my_own": mlp.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").state_dict.keys() == mlp.state_dict().keys()


def test_two_unknown_keys_are_refused_by_name(tools, mlp, tmp_path):
    torch.save({"a": mlp.state_dict(), "b": mlp.state_dict()}, tmp_path / "a.pt")
    message = tools.refuses(tmp_path / "a.pt")
    assert "more than one model" in message
    assert "'a', 'b'" in message


def test_the_model_is_preferred_to_its_average(mlp, tmp_path):
    state = {name: tensor + 1 for name, tensor in mlp.state_dict().items()}
    torch.save({"ema": state, "model": mlp.state_dict()}, tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt").state_dict["0.bias"], mlp[0].bias)


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("module.", ["module."]),
        ("_orig_mod.", ["_orig_mod."]),
        ("module._orig_mod.", ["module.", "_orig_mod."]),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_prefixes_of_wrappers(mlp, tmp_path, prefix, removed, nested):
    state = {prefix + name: tensor for name, tensor in mlp.state_dict().items()}
    torch.save({"model": state} if nested else state, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert loaded.state_dict.keys() == mlp.state_dict().keys()
    notes = [f"removed the prefix {each!r} from every name" for each in removed]
    assert list(loaded.source.notes[-len(notes) :]) == notes


def test_a_compiled_model_inside_data_parallel(mlp, tmp_path):
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in mlp.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").state_dict.keys() == mlp.state_dict().keys()


def test_a_prefix_of_some_names_only_is_kept(tmp_path):
    state = {"module.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").state_dict.keys() == state.keys()


def test_what_is_no_tensor_is_left_out_and_said(mlp, tmp_path):
    torch.save({**mlp.state_dict(), "version": 2}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert loaded.state_dict.keys() == mlp.state_dict().keys()
    assert "version" in loaded.source.notes[0]


def test_an_optimizer_alone_is_no_model(tools, mlp, tmp_path):
    optimizer = torch.optim.Adam(mlp.parameters())
    mlp(torch.randn(2, 33)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    assert "no model in the file" in tools.refuses(tmp_path / "a.pt")
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "b.pt")
    assert "no model in the file" in tools.refuses(tmp_path / "b.pt")


OTHERS = [[], [1, 2], 3, "text", None, {}, {1: 2}, {1: torch.ones(2)}, {"a": 1}, torch.ones(2)]


@pytest.mark.parametrize("value", OTHERS, ids=repr)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_other_objects(tools, tmp_path, value, new):
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    tools.refuses(tmp_path / "a.pt")


def test_keys_with_line_breaks_do_not_break_the_message(tools, tmp_path):
    torch.save({"a\nb\x1b[2J": 1}, tmp_path / "a.pt")
    assert "\x1b" not in tools.refuses(tmp_path / "a.pt")


def test_a_model_without_parameters_is_a_model(tmp_path):
    """That there is nothing to quantize in it is for the flows to say (exit 5)."""
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "a.pt")
    assert isinstance(load(tmp_path / "a.pt").model[0], nn.ReLU)


def test_a_lazy_model(tools, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every lazy module
        torch.save(nn.Sequential(nn.LazyLinear(2)), tmp_path / "a.pt")
    tools.refuses(tmp_path / "a.pt")


def test_tensors_of_the_meta_device(tools, tmp_path):
    torch.save({"fc.weight": torch.empty(2, 2, device="meta")}, tmp_path / "a.pt")
    assert "no values" in tools.refuses(tmp_path / "a.pt")


def test_an_expanded_tensor_that_claims_too_much(tools, tmp_path):
    torch.save({"fc.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    assert "claims more values" in tools.refuses(tmp_path / "a.pt")
