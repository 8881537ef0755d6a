"""Inputs inferred from a model's first layer; the model itself is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkit.models import infer, run

MODELS = {
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (2, 12), "Linear"),
    "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3)), (2, 2, 64), "Conv1d"),
    "conv2d": (nn.Sequential(nn.Conv2d(1, 3, 3)), (2, 1, 32, 32), "Conv2d"),
    "conv3d": (nn.Sequential(nn.Conv3d(1, 2, 3)), (2, 1, 16, 16, 16), "Conv3d"),
    "one size only": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1352, 3)),
        (2, 1, 28, 28),
        "Conv2d",
    ),
    "embedding": (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (2, 16), "Embedding"),
    "recurrent": (nn.LSTM(5, 4, batch_first=True), (2, 16, 5), "LSTM"),
    "time first": (nn.GRU(5, 4), (16, 2, 5), "GRU"),
    "half": (nn.Sequential(nn.Linear(4, 4)).bfloat16(), (2, 4), "Linear"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layer(name):
    model, shape, kind = MODELS[name]
    inputs = infer(model)
    assert tuple(inputs.args[0].shape) == shape
    assert f"{kind})" in inputs.origin
    assert "x".join(map(str, shape)) in inputs.origin
    assert all(torch.isfinite(t).all() for t in run(model, inputs))
    if kind == "Embedding":
        assert inputs.args[0].dtype == torch.int64
        assert inputs.args[0].max() < 11


NONE = {
    "no layer": nn.Sequential(nn.ReLU()),
    "a parameter only": nn.ParameterList([nn.Parameter(torch.ones(2))]),
    "another order": nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5)),
    "an empty table": nn.Sequential(nn.Embedding(0, 4)),
}


@pytest.mark.parametrize("name", NONE)
def test_nothing_found(name):
    assert infer(NONE[name]) is None


def test_outputs_that_are_not_finite_are_not_taken():
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.bias, torch.inf)
    assert infer(nn.Sequential(layer)) is None


class Stateful(nn.Module):
    """A forward that writes, replaces and adds buffers, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1))
        self.register_buffer("maybe", None)

    def forward(self, x):
        self.count += 1
        self.cache = torch.ones(7)
        self.register_buffer("added", torch.ones(2))
        return self.norm(self.fc(x)) + torch.rand(())


def test_the_model_is_left_as_it_was():
    model = Stateful().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert infer(model) is not None
    assert model.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_seed():
    model = nn.Linear(3, 2)
    first, again, other = (infer(model, seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=20,
    )  # fmt: skip
    inputs = infer(transformers.BertModel(config))
    assert set(inputs.kwargs) == {"input_ids", "attention_mask"}
    assert inputs.kwargs["input_ids"].min() >= 1
    assert inputs.kwargs["input_ids"].max() < 9
