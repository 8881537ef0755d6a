"""What the steps make is compiled and trained like any other model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkit
from qkit.flows.cluster import start_clusters
from qkit.flows.train import TrainOptions, labelled, train
from qkit.pruning.masks import Masks

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(4))
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(5))


def make() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.Linear(32, 4)),
    )


MADE: dict[str, Any] = {
    "prune": lambda m: qkit.prune(m, X[:4], round_to=1, latency=False)[0],
    "factorize": lambda m: qkit.factorize(m, amount=0.5, inputs=X[:4], latency=False)[0],
    "sparsify": lambda m: qkit.sparsify(m, 0.5)[0],
    "cluster": lambda m: start_clusters(m, 8).model,
}


def gradients(model: nn.Module, called: Any) -> list[Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(called(X), Y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo, of lookups
@pytest.mark.parametrize("step", MADE)
def test_they_compile_whole(step):
    model = MADE[step](make().eval()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    wanted, found = gradients(model, model), gradients(model, compiled)
    assert len(wanted) >= len(list(model.parameters())) - 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_model_is_trained_and_keeps_its_zeros():
    model, _ = qkit.sparsify(make(), 0.8)
    plain, masks = copy.deepcopy(model), Masks.of(model)
    options = TrainOptions(epochs=1, batch_size=16, lr=0.01)
    with masks.hold(model):
        train(torch.compile(model, backend="aot_eager"), labelled(X, Y), options=options)
    assert all(not model.get_parameter(n)[~kept].any() for n, kept in masks.kept.items())
    with masks.hold(plain):
        train(plain, labelled(X, Y), options=options)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
