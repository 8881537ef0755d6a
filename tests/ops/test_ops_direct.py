"""Loaded programs call the kernels as layers do: the same bits, the same checks, when unwatched."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qkit
from qkit import ops
from qkit.ops import direct

SCHEMES = ("w8a16", "w8a8", "w8a8-static", "nf4")


class Net(nn.Module):
    """Each kind of layer that is an operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 33)
        self.conv = nn.Conv1d(33, 7, 3, padding=1)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.conv(self.table(ids).mT).mT * scale)


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"ids": torch.randint(11, (3, 6)), "scale": torch.rand(3, 1, 1) + 0.5}


@pytest.fixture(scope="module", params=SCHEMES)
def both(request, given, tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """A quantized model, and what is loaded of its artifact."""
    return saved(given, request.param, tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def loaded(given, tmp_path_factory) -> nn.Module:
    """What is loaded of an artifact of w8a16."""
    return saved(given, "w8a16", tmp_path_factory.mktemp("artifact"))[1]


def saved(given: dict[str, Tensor], scheme: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    model, _ = qkit.quantize(Net().eval(), scheme, calib=given)
    qkit.save(model, folder / "out", inputs=given)
    return model, qkit.load(folder / "out")


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The operators that go through torch's dispatcher, as a list that grows."""
    seen: list[str] = []
    plain = direct.Direct.forward

    def watched(self, *args):
        operator = self._operator
        self._operator = lambda *given: (seen.append(str(operator)), operator(*given))[1]
        try:
            return plain(self, *args)
        finally:
            self._operator = operator

    monkeypatch.setattr(direct.Direct, "forward", watched)
    return seen


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch copies its own trees so
def test_the_kernels_are_called_and_give_the_same_bits(both, given, dispatched):
    model, loaded = both
    with torch.no_grad(), ops.count_calls() as ours:
        wanted = model(**given)
    with torch.no_grad(), ops.count_calls() as theirs:
        assert torch.equal(loaded(**given), wanted)
        assert torch.equal(copy.deepcopy(loaded)(**given), wanted)
    assert theirs == Counter({name: 2 * count for name, count in ours.items()})
    assert dispatched == []


def test_gradients_go_through_the_dispatcher(both, given, dispatched):
    model, loaded = both
    found = []
    for each in (model, loaded):
        scale = given["scale"].clone().requires_grad_()
        each.requires_grad_(False)
        each(ids=given["ids"], scale=scale).square().sum().backward()
        found.append(scale.grad)
    assert torch.equal(*found)
    assert len(dispatched) == 1  # the head; what is before the scale needs no gradient


def test_compiled_and_exported_again(both, given):
    model, loaded = both
    with torch.no_grad():
        wanted = model(**given)
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(**given), wanted)
        again = torch.export.export(loaded, (), given)
        assert any("qkit." in str(node.target) for node in again.graph.nodes)
        assert torch.equal(again.module()(**given), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.zeros(3, 7, dtype=torch.int64)},
        {"scale": torch.ones(2, 1, 1)},
        {"scale": torch.ones(3, 1)},
        {"scale": None},
        {"more": torch.ones(3)},
    ],
    ids=["length", "batch", "dimensions", "none", "more"],
)
def test_inputs_are_checked_at_every_call(given, loaded, change):
    with torch.no_grad():
        for _ in range(2):
            wanted = loaded(**given)
            with pytest.raises((RuntimeError, AssertionError, TypeError, ValueError)):
                loaded(**given | change)
            fewer = {name: value[:2] for name, value in given.items()}
            torch.testing.assert_close(loaded(**fewer), wanted[:2])


def test_as_many_kinds_of_inputs_as_come(given, loaded, monkeypatch):
    monkeypatch.setattr(direct, "MAX_KNOWN", 2)
    for count in (3, 2, 1, 2, 1):
        part = {name: value[:count] for name, value in given.items()}
        assert loaded(**part).shape == (count, 6, 5)
