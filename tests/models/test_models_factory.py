"""--model: finding the user's function, and putting tensors into what it builds."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qkit.errors import InputError, UsageError
from qkit.models import load, resolve_factory, skeleton

SOURCE = """
import torch
from torch import nn
from dataclasses import dataclass

@dataclass
class Size:
    n: int = 3

def build():
    return nn.Linear(Size().n, 2)

class Model(nn.Module):
    pass

class Box:
    build = staticmethod(build)

number = 3
nothing = None

def text():
    return "x"

def fails():
    raise RuntimeError("first line\\nsecond line")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "their_models"
    sys.modules.pop("their_models", None)


@pytest.mark.parametrize("where", ["their_models", "their_models.py", "./their_models.py"])
@pytest.mark.parametrize(
    ("name", "kind"), [("build", "Linear"), ("Model", "Model"), ("Box.build", "Linear")]
)
def test_found(module, where, name, kind):
    assert type(resolve_factory(f"{where}:{name}")()).__name__ == kind


def test_an_installed_class():
    assert type(resolve_factory("torch.nn:Identity")()) is nn.Identity


def test_a_file_does_not_replace_a_module_of_its_name(tmp_path):
    (tmp_path / "json.py").write_text(SOURCE)
    before = sys.modules["json"]
    assert type(resolve_factory(f"{tmp_path / 'json.py'}:build")()) is nn.Linear
    assert sys.modules["json"] is before


SPECS = {
    "": "not a factory",
    "their_models": "not a factory",
    ":build": "not a factory",
    "their_models:": "not a factory",
    "no_such_module:build": "cannot import",
    "their_models.inner:build": "cannot import",
    "none.py:build": "no such file",
    "their_models:absent": "no function or class",
    "their_models:nothing": "no function or class",
    "their_models:Box.absent": "no function or class",
    "their_models:number": "not callable",
    "broken.py:build": "cannot import",
    "raises.py:build": "cannot import",
    ".relative:build": "cannot import",
}


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_not_found(module, tmp_path, spec):
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "raises.py").write_text("raise ValueError('a\\nb')\n")
    with pytest.raises(UsageError, match=SPECS[spec]) as caught:
        resolve_factory(spec)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("text", "no nn.Module"), ("fails", "first line")])
def test_factories_that_fail(module, mlp, tmp_path, name, words):
    torch.save(mlp.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=words) as caught:
        load(tmp_path / "a.pt", factory=f"{module}:{name}")
    assert "second line" not in str(caught.value)


def test_a_callable_that_gives_no_module(mlp, tmp_path):
    torch.save(mlp.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"no nn\.Module"):
        load(tmp_path / "a.pt", factory=dict)


# Filling


@pytest.mark.parametrize("kind", ["state", "model", "script", "safetensors"])
def test_any_file_fills_the_model(tools, mlp, tmp_path, kind):
    path = tmp_path / "a"
    if kind == "script":
        tools.save_script(mlp, path)
    elif kind == "safetensors":
        save_file(mlp.state_dict(), path)
    else:
        torch.save(mlp if kind == "model" else mlp.state_dict(), path)

    def build():
        return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))

    loaded = load(path, factory=build)
    x = torch.randn(2, 33)
    assert torch.equal(loaded.model(x), mlp(x))
    assert not loaded.model.training
    assert loaded.state_dict is None


def test_the_factory_is_remembered_by_name(tmp_path):
    torch.save({"weight": torch.full((1,), 0.5)}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", factory="torch.nn:PReLU")
    assert loaded.builder == {"kind": "factory", "factory": "torch.nn:PReLU"}
    assert loaded.model.weight.item() == 0.5
    with torch.device("meta"):
        assert skeleton(loaded.builder, tmp_path).weight.is_meta


def test_names_that_do_not_fit_are_listed(tmp_path, mlp):
    state = mlp.state_dict()
    state["surplus"] = state.pop("0.bias")
    state["2.bias"] = torch.ones(9)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError) as caught:
        load(
            tmp_path / "a.pt",
            factory=lambda: nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7)),
        )
    message = str(caught.value)
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: surplus" in message
    assert "1 misshapen: 2.bias (9,) for (7,)" in message
    assert "a.pt" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_types_are_those_of_the_file(tmp_path, dtype):
    torch.save(nn.Linear(3, 2).to(dtype).state_dict(), tmp_path / "a.pt")
    assert load(tmp_path / "a.pt", factory=lambda: nn.Linear(3, 2)).model.weight.dtype == dtype


def test_built_without_memory_where_possible(tmp_path):
    devices = []

    def build():
        layer = nn.Linear(3, 2)
        devices.append(layer.weight.device.type)
        return layer

    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "a.pt")
    load(tmp_path / "a.pt", factory=build)
    assert devices == ["meta"]


class Holder:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


class Computes(nn.Module):
    """Makes tensors in its constructor that no state dict holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        table = torch.arange(3.0) + 1
        self.how = how
        if how == "buffer":
            self.register_buffer("table", table, persistent=False)
        elif how == "attribute":
            self.table = table
        elif how == "list":
            self.table = [table]
        elif how == "nested":
            self.table = {"a": (table,)}
        elif how == "partial":
            self.table = functools.partial(torch.mul, table)
        elif how == "object":
            self.table = Holder(table)
        elif how == "number":
            self.table = [x.item() for x in table]

    def forward(self, x):
        table = self.table
        if self.how == "list":
            table = table[0]
        elif self.how == "nested":
            table = table["a"][0]
        elif self.how == "partial":
            return table(self.fc(x))
        elif self.how == "object":
            table = table.tensor
        elif self.how == "number":
            table = torch.tensor(table)
        return self.fc(x) * table


@pytest.mark.parametrize(
    "how", ["buffer", "attribute", "list", "nested", "partial", "object", "number"]
)
def test_tensors_that_the_constructor_computes(tmp_path, how):
    model = Computes(how)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    x = torch.randn(2, 3)
    loaded = load(tmp_path / "a.pt", factory=lambda: Computes(how)).model
    assert torch.equal(loaded(x), model(x))


def build_tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize("kept", ["0.weight", "2.weight", "both"])
def test_ties_of_the_model_survive(tied, tmp_path, kept):
    """safetensors files hold a shared tensor once, under either name."""
    dropped = {"0.weight", "2.weight"} - {kept} if kept != "both" else set()
    state = {n: t.clone() for n, t in tied.state_dict().items() if n not in dropped}
    save_file(state, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors", factory=build_tied).model
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, tied[0].weight)


def test_ties_that_the_file_does_not_have(tmp_path):
    state = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"shares.*0\.weight and 2\.weight"):
        load(tmp_path / "a.safetensors", factory=build_tied)


def test_an_unknown_builder(tmp_path):
    with pytest.raises(InputError, match="unknown kind"):
        skeleton({"kind": "magic"}, tmp_path)
