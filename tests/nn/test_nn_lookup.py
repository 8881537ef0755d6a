"""Opened subclasses of ``nn.Embedding`` compute what the class itself computes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from command import verify_in_this_process
from torch import Tensor, nn
from torch.nn import functional as F

import qkit
from qkit.nn import survey
from qkit.nn.lookup import OpenLookup
from qkit.nn.open import opening, why_closed

IDS = torch.tensor([[3, 0, 30], [7, 7, 1]])


class Scaled(nn.Embedding):
    """As transformers' scaled word embeddings, with the scale as a buffer too."""

    def __init__(self) -> None:
        super().__init__(31, 7, padding_idx=0)
        self.scale = 3.0
        self.register_buffer("shift", torch.ones(7), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale + self.shift


class Reads(nn.Embedding):
    """Without ``super()``: positions are a slice of the weight."""

    def __init__(self) -> None:
        super().__init__(31, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[: ids.shape[1]] + F.embedding(ids, self.weight)


class Renamed(nn.Embedding):
    """A class of its own that changes nothing."""

    def __init__(self) -> None:
        super().__init__(31, 7, scale_grad_by_freq=True)


def of_transformers(name: str) -> nn.Module:
    from transformers.models.bart import modeling_bart
    from transformers.models.whisper import modeling_whisper

    if name == "scaled":
        return modeling_bart.BartScaledWordEmbedding(31, 7, 1, embed_scale=2.5)
    if name == "learned":
        return modeling_bart.BartLearnedPositionalEmbedding(31, 7)
    return modeling_whisper.WhisperPositionalEmbedding(31, 7)


def made(kind: type[nn.Module] | str) -> nn.Module:
    return of_transformers(kind) if isinstance(kind, str) else kind()


KINDS = pytest.mark.parametrize("kind", [Scaled, Reads, Renamed, "scaled", "learned", "positions"])


def opened(module: nn.Module) -> nn.Module:
    form = opening(module)
    assert form is not None
    assert form.kind == type(module).__name__
    return form.module


@KINDS
def test_it_is_the_same_and_holds_the_very_weight(kind) -> None:
    module = made(kind).eval()
    new = opened(module)
    assert isinstance(new, OpenLookup)
    assert isinstance(new, type(module))
    assert not new.training
    assert torch.equal(new(IDS), module(IDS))
    assert dict(new.named_parameters()).keys() == {"table.weight"}
    assert new.table.weight is module.weight
    assert type(new.table) is nn.Embedding
    assert new.table.padding_idx == module.padding_idx
    assert new.state_dict().keys() == {"table.weight"}
    assert opening(new) is None


@KINDS
def test_what_replaces_the_table_is_used(kind) -> None:
    module = made(kind)
    new = opened(module)
    new.table = nn.Embedding.from_pretrained(2 * module.weight.detach())
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(new(IDS), module(IDS))


@KINDS
def test_copies_and_pickles(kind) -> None:
    new = opened(made(kind))
    buffer = io.BytesIO()
    pickle.dump(new, buffer)
    for again in (copy.deepcopy(new), pickle.loads(buffer.getvalue())):
        assert type(again) is type(new)
        assert torch.equal(again(IDS), new(IDS))
        assert again.table.weight is not new.table.weight


def test_gradients_reach_the_weight() -> None:
    module = Scaled()
    opened(module)(IDS).sum().backward()
    grad = module.weight.grad
    assert grad is not None
    assert grad[7].eq(6).all()
    assert not grad[0].any()  # padding


def test_the_survey_counts_every_parameter_once() -> None:
    model = nn.ModuleDict({"scaled": Scaled(), "plain": nn.Embedding(5, 3)})
    entries = survey(model)
    assert sum(e.parameters for e in entries) == sum(p.numel() for p in model.parameters())
    assert [e.name for e in entries] == ["scaled.table", "plain"]
    assert entries[0].shape == (31, 7)


class Tied(nn.Module):
    """Scaled words in, and the same table as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = Scaled(), nn.Linear(7, 31, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_quantized_saved_and_loaded_with_its_tie(tmp_path, monkeypatch) -> None:
    verify_in_this_process(monkeypatch)
    net = Tied()
    qnet, report = qkit.quantize(net, "w4a16-g32", inputs=IDS, latency=False)
    assert [(row.name, row.parameters, row.note) for row in report.layers] == [
        ("words.table", 217, "one group of 7 a row"),
        ("head", 0, "tied to words.table"),
    ]
    artifact = qkit.save(qnet, tmp_path / "out", inputs=IDS, report=report)
    assert report.verification["bit_identical"]
    again = qkit.load(artifact.path, into=Tied)
    assert torch.equal(again(IDS), qnet(IDS))
    assert again.head.stored_weight is again.words.table.stored_weight
    with torch.no_grad():  # the oracle: the class itself, with the weight that the codes stand for
        net.words.weight.copy_(qnet.words.weight)
        torch.testing.assert_close(qnet(IDS), net(IDS))
    left, _ = qkit.quantize(nn.Sequential(Scaled(), nn.Linear(7, 3)), ignore=["Scaled"])
    assert type(left[0]) is Scaled


def test_what_has_tensors_of_its_own_stays_closed() -> None:
    module = Scaled()
    module.extra = nn.Parameter(torch.ones(1))
    assert opening(module) is None
    assert "extra" in (why_closed(module) or "")
