"""Capture: modes, dynamic dimensions, and errors that name the user's line."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.graph import capture
from qkit.graph.kinds import kind_of


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_any_batch_runs_whatever_the_example_was(mlp, batch):
    captured = capture(mlp, (torch.randn(batch, 33),), {})
    assert captured.mode == "non-strict"
    assert captured.notes == ()
    module = captured.module()
    for size in (1, 2, 3, 31):
        x = torch.randn(size, 33)
        assert torch.equal(module(x), mlp(x))


def test_named_dimensions_vary_together():
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a + b).cumsum(1)

    a = torch.randn(2, 5, 3)
    captured = capture(Pair(), (), {"a": a, "b": a}, dims={"a": {1: "time"}, "b": {1: "time"}})
    x = torch.randn(3, 31, 3)
    assert torch.equal(captured.module()(a=x, b=x), Pair()(x, x))


def test_the_batch_may_be_another_dimension():
    model = nn.LSTM(7, 5)  # [time, batch, features], and a fixed time
    captured = capture(model, (torch.randn(4, 3, 7),), {}, dims={"input": {1: "batch"}})
    x = torch.randn(4, 1, 7)
    assert torch.equal(captured.module()(x)[0], model(x)[0])


def test_without_their_names_other_dimensions_are_fixed():
    captured = capture(nn.ReLU(), (torch.randn(2, 5),), {})
    with pytest.raises(Exception, match="size"):
        captured.program.module()(torch.randn(2, 6))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 6).relu()


def test_a_model_of_one_batch_is_captured_with_a_note():
    captured = capture(Fixed(), (torch.randn(4, 6),), {})
    assert captured.shapes is None
    assert "the batch is fixed at 4" in captured.notes[0]
    x = torch.randn(4, 6)
    assert torch.equal(captured.module()(x), x.relu())


def test_what_was_asked_for_must_vary():
    with pytest.raises(InputError, match="cannot be captured") as caught:
        capture(Fixed(), (torch.randn(4, 6),), {}, dims={"x": {0: "n"}})
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("dims", "message"),
    [({"y": {0: "n"}}, "no such input"), ({"x": {2: "n"}}, "no dimension 2")],
)
def test_unknown_dimensions(dims, message):
    with pytest.raises(UsageError, match=message):
        capture(Fixed(), (torch.randn(4, 6),), {}, dims=dims)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.sum() > 0:
            return y
        return -y


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1).relu()


def test_control_flow_by_values_names_the_line_and_the_way_out():
    with pytest.raises(InputError, match="cannot be captured") as caught:
        capture(Branch(), (torch.randn(2, 3),), {})
    line = inspect.getsourcelines(Branch.forward)[1] + 2
    assert f"{__file__}:{line}: if y.sum() > 0:" in str(caught.value)
    assert "torch.cond" in caught.value.fix


def test_what_only_strict_export_takes_is_captured_strictly():
    # Fake tensors have no numpy; strict export reads numpy calls as torch's.
    captured = capture(Numpy(), (torch.randn(2, 3),), {})
    x = torch.randn(5, 3)
    assert captured.mode == "strict"
    assert torch.equal(captured.module()(x), (x + 1).relu())


def test_a_model_without_values():
    with pytest.raises(InputError, match="meta device") as caught:
        capture(nn.Linear(3, 3, device="meta"), (torch.randn(2, 3),), {})
    assert caught.value.where == "weight"


def test_every_node_has_a_source_of_its_own(residual, images):
    module = captured = capture(residual, (images,), {}).module()
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [node.meta["source_fn_stack"][0][0] for node in calls]
    assert len(set(names)) == len(names) > 8
    sources = [node.meta["source_fn_stack"][0][1] for node in calls if kind_of(node)]
    assert sources.count(nn.Conv2d) == 3
    assert sources.count(nn.ReLU) == 3
    assert torch.equal(captured(images), residual(images))


def test_dead_code_is_gone():
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            _ = x.sin()
            return x.cos()

    nodes = capture(Dead(), (torch.randn(2),), {}).module().graph.nodes
    assert "aten::sin" not in [getattr(n.target, "_schema", n).name for n in nodes]


def test_nothing_is_printed_and_logging_is_as_before(capfd):
    logger = logging.getLogger("torch")
    level = logger.level
    with pytest.raises(InputError):
        capture(Branch(), (torch.randn(2, 3),), {})
    capture(Fixed(), (torch.randn(4, 6),), {})
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logger.level == level


@pytest.mark.parametrize(
    "name", ['0", print(1)) or getattr(self, "0', "a'b", "a\\", 'a")\nprint(1)\n#']
)
def test_a_name_never_becomes_code(name):
    # torch writes it between quotes into the source of the program, which then runs.
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    model.add_module(name, nn.Linear(3, 3))
    with pytest.raises(InputError, match="would be code") as error:
        capture(model, (x,), {})
    assert error.value.exit_code == 3
    holder = nn.Linear(3, 3)
    holder.register_parameter(name, nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match="would be code"):
        capture(holder, (x,), {})
    plain = nn.Sequential(nn.Linear(3, 3))
    plain.add_module("a <b>&;(c) \u00e9", nn.Linear(3, 3))
    assert torch.equal(capture(plain, (x,), {}).module()(x), plain(x))
