"""Blocks that are passed by: the right ones, as many as asked for, and reloaded onto the class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qkit
from qkit.errors import BudgetError, CoverageError, UsageError
from qkit.pruning.surgery import Edits, Skipped, edits_of


class Block(nn.Module):
    """A residual block; ``alone`` gives a tuple, as layers of transformers do."""

    def __init__(self, width: int, alone: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.alone = alone
        self.index = 7

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor]:
        y = x + self.inner(x)
        return (y,) if self.alone else y


class Net(nn.Module):
    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16, alone) for _ in range(4))
        self.tail = nn.Sequential(Block(16, False), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            assert block.index == 7  # as code that asks its layers for something
            x = block(x, mask=None)
            x = x[0] if isinstance(x, tuple) else x
        return self.tail(x)


def net(alone: bool = False) -> Net:
    """The blocks matter by 1, 0.1, 3 and 0.01."""
    torch.manual_seed(0)
    model = Net(alone).eval()
    with torch.no_grad():
        for block, size in zip(model.blocks, (1.0, 0.1, 3.0, 0.01), strict=True):
            block.inner[2].weight *= size
            block.inner[2].bias *= size
    return model


X = torch.randn(5, 8)


def skipped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Skipped)]


@pytest.mark.parametrize("alone", [False, True])
def test_those_go_that_matter_least(alone):
    model = net(alone)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    small, report = qkit.prune(
        model, X, amount=1.5 * block / whole, unit="params", blocks=True, latency=False
    )
    assert skipped(small) == ["blocks.1", "blocks.3"]
    assert skipped(model) == []
    assert report.after["params"] == whole - 2 * block
    assert report.error["sqnr_db"] > 15
    by_hand = net(alone)
    with torch.no_grad():
        for index in (1, 3):
            for p in by_hand.blocks[index].inner[2].parameters():
                p.zero_()
        torch.testing.assert_close(small(X), by_hand(X))
    cuts = {row.name: (row.units, row.kept) for row in report.groups}
    assert cuts == {"blocks": (4, 2), "tail": (1, 1)}


@pytest.mark.parametrize("alone", [False, True])
def test_they_reload_and_go_on(alone, tmp_path, monkeypatch):
    from command import verify_in_this_process

    verify_in_this_process(monkeypatch)
    small, report = qkit.prune(net(alone), X, amount=0.3, blocks=True, latency=False)
    smaller, again = qkit.prune(small, X, amount=0.4, round_to=1, latency=False)
    assert again.after["macs"] < report.after["macs"]
    for model in (small, smaller):
        qkit.save(model, tmp_path / "out", inputs=X, report=report, overwrite=True)
        loaded = qkit.load(tmp_path / "out", into=lambda: Net(alone))
        assert skipped(loaded) == skipped(small)
        with torch.no_grad():
            assert torch.equal(loaded(X), model(X))
    # Blocks after channels too: the shapes of what is skipped are forgotten.
    narrow, _ = qkit.prune(net(alone), X, amount=0.3, round_to=1, latency=False)
    both, report = qkit.prune(narrow, X, amount=0.2, blocks=True, latency=False)
    gone = tuple(f"{name}." for name in skipped(both))
    assert not any(name.startswith(gone) for name in edits_of(both).shapes)
    qkit.save(both, tmp_path / "both", inputs=X, report=report)
    with torch.no_grad():
        assert torch.equal(qkit.load(tmp_path / "both", into=lambda: Net(alone))(X), both(X))
    quantized, _ = qkit.quantize(both, "w8a16", inputs=X)
    qkit.save(quantized, tmp_path / "q", inputs=X)
    with torch.no_grad():
        assert torch.equal(qkit.load(tmp_path / "q", into=lambda: Net(alone))(X), quantized(X))


def test_limits_are_kept():
    small, _ = qkit.prune(net(), X, amount=0.15, blocks=True, ignore=["blocks.3"], latency=False)
    assert skipped(small) == ["blocks.1"]
    for options, kind, text in (
        ({"amount": 0.9}, BudgetError, "not in blocks"),
        ({"keep": 4}, BudgetError, "not in blocks"),
        ({"ignore": ["blocks.9"]}, UsageError, "no module is called so"),
        ({"importance": "l2"}, UsageError, "for channels"),
        ({"per_layer": True}, UsageError, "for channels"),
        ({"unit": "latency"}, UsageError, "counted, not timed"),
    ):
        with pytest.raises(kind, match=text):
            qkit.prune(net(), X, blocks=True, latency=False, **options)
    with pytest.raises(CoverageError, match="no block"):
        qkit.prune(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X[:, :4], blocks=True)


def test_layers_of_a_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=99,
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config).eval()
    ids = {"input_ids": torch.randint(3, 99, (2, 7))}
    small, report = qkit.prune(bert, ids, amount=0.4, blocks=True, latency=False)
    assert len(skipped(small)) == 2
    assert all(name.startswith("bert.encoder.layer.") for name in skipped(small))
    assert report.ratio["macs"] <= 0.6


def test_edits_are_read_strictly():
    edits = Edits({"a.weight": (3, 4)}, {}, {"b": True})
    assert Edits.from_json(edits.to_json()) == edits
    old = {"shapes": {"a.weight": [3, 4]}, "attributes": {}}
    assert Edits.from_json(old) == Edits({"a.weight": (3, 4)})
    for wrong in ({"b": 1}, ["b"]):
        with pytest.raises(qkit.errors.InputError):
            Edits.from_json(old | {"skipped": wrong})
