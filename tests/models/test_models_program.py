"""torch.export programs become models with real layers, and give the very same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from qkit.models import load


def reload(tools, model, tmp_path, *args, **kwargs):
    tools.save_program(model.eval(), tmp_path / "a.pt2", *args, **kwargs)
    loaded = load(tmp_path / "a.pt2")
    want = model(*args, **kwargs)
    got = loaded.model(*args, **kwargs)
    assert torch.equal(got, want)
    return loaded


def kinds(loaded) -> dict[str, type]:
    layers = (nn.Linear, nn.Conv2d)
    return {n: type(m) for n, m in loaded.model.named_modules() if isinstance(m, layers)}


CONVOLUTIONS = [
    {},
    {"bias": False},
    {"padding": 1},
    {"padding": (1, 2), "bias": False},
    {"padding": "same", "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": "valid", "bias": False},
    {"padding": "valid", "stride": 2, "groups": 2},
    {"stride": (2, 1)},
    {"dilation": 2, "groups": 4},
    {"groups": 2, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "bias": False},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(tools, tmp_path, options):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **options))
    loaded = reload(tools, model, tmp_path, torch.randn(2, 4, 9, 9))
    layer = loaded.model.get_submodule("0")
    assert type(layer) is nn.Conv2d
    assert layer.groups == model[0].groups
    assert (layer.bias is None) == (model[0].bias is None)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(tools, tmp_path, bias):
    model = nn.Sequential(nn.Linear(5, 3, bias=bias), nn.ReLU(), nn.Linear(3, 2, bias=bias))
    loaded = reload(tools, model, tmp_path, torch.randn(4, 5))
    assert kinds(loaded) == {"0": nn.Linear, "2": nn.Linear}
    assert loaded.model.state_dict().keys() == model.state_dict().keys()


def test_a_network_with_batch_norm(tools, cnn, tmp_path):
    for _ in range(3):
        cnn.train()(torch.randn(4, 3, 16, 16))
    loaded = reload(tools, cnn, tmp_path, torch.randn(2, 3, 16, 16))
    assert kinds(loaded) == {"0": nn.Conv2d, "3": nn.Conv2d, "6": nn.Linear}
    assert not any(m.training for n, m in loaded.model.named_modules() if n in ("0", "3", "6"))


def test_a_layer_that_is_called_twice(tools, tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    loaded = reload(tools, Twice(), tmp_path, torch.randn(2, 4))
    assert kinds(loaded) == {"fc": nn.Linear}


def test_ties_survive(tools, tied, tmp_path):
    loaded = reload(tools, tied, tmp_path, torch.randn(2, 4))
    state = loaded.model.state_dict(keep_vars=True)
    assert {p.data_ptr() for n, p in state.items() if "weight" in n} == {
        state["0.weight"].data_ptr()
    }


class Direct(nn.Module):
    """Reads its weight elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.vector = nn.Parameter(torch.randn(4))
        self.register_buffer("weight_of_no_layer", torch.randn(3, 4))

    def forward(self, x):
        y = self.fc(x) + self.fc.weight.sum()
        return functional.linear(
            functional.linear(y, self.weight_of_no_layer.t() @ self.weight_of_no_layer), self.vector
        )


def test_weights_that_something_else_reads_stay_where_they_are(tools, tmp_path):
    assert kinds(reload(tools, Direct(), tmp_path, torch.randn(2, 4))) == {}


def test_a_weight_that_is_a_vector(tools, tmp_path):
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Module()
            self.fc.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return functional.linear(x, self.fc.weight)

    assert kinds(reload(tools, Vector(), tmp_path, torch.randn(2, 4))) == {}


def test_constants_and_buffers_that_are_not_saved(tools, tmp_path):
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.plain = torch.tensor([2.0, 3.0])
            self.register_buffer("hidden", torch.tensor([5.0]), persistent=False)

        def forward(self, x):
            return self.fc(x) * self.plain + self.hidden

    reload(tools, Constants(), tmp_path, torch.randn(2, 4))


def test_the_stored_inputs(tools, tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, scale):
            return self.fc(x) * scale

    x, scale = torch.randn(2, 4), torch.ones(2)
    loaded = reload(tools, Two(), tmp_path, x, scale=scale)
    assert torch.equal(loaded.example_inputs.args[0], x)
    assert torch.equal(loaded.example_inputs.kwargs["scale"], scale)
    assert "torch.export" in loaded.example_inputs.origin


def test_a_dynamic_batch(tools, mlp, tmp_path):
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(mlp, (torch.randn(4, 33),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "a.pt2")
    model = load(tmp_path / "a.pt2").model
    x = torch.randn(9, 33)
    assert torch.equal(model(x), mlp(x))


def test_names_beyond_ascii(tools, tmp_path):
    model = nn.Sequential()
    model.add_module("größe", nn.Linear(3, 2))
    loaded = reload(tools, model, tmp_path, torch.randn(2, 3))
    assert kinds(loaded) == {"größe": nn.Linear}


def test_a_name_without_the_usual_suffix(tools, mlp, tmp_path, caplog):
    tools.save_program(mlp, tmp_path / "a.pt2", torch.randn(2, 33))
    (tmp_path / "a.pt2").rename(tmp_path / "a.bin")
    caplog.clear()
    load(tmp_path / "a.bin")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_both_modes_can_be_asked_for(tools, mlp, tmp_path):
    tools.save_program(mlp, tmp_path / "a.pt2", torch.randn(2, 33))
    model = load(tmp_path / "a.pt2").model
    assert model.eval() is model
    assert model.train() is model
