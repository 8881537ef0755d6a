"""Students derived from their teacher, and what is made alike in both."""

from __future__ import annotations

import pytest
import torch
from graph_models import Encoder
from torch import nn

from qkit import errors
from qkit.distill import Match, Matched, blocks_of, keep_layers, layer_map
from qkit.distill.match import Taught, listening
from qkit.distill.student import spread


def test_layers_are_spread_evenly():
    assert [spread(n, 6) for n in (1, 2, 3, 5)] == [[5], [0, 5], [0, 2, 5], [0, 1, 2, 3, 5]]


def test_fewer_layers_with_the_weights_of_those_that_stay():
    teacher = nn.Sequential(nn.Linear(3, 5), *[nn.Sequential(nn.Linear(5, 5))] * 1)
    with pytest.raises(errors.UsageError, match="no list of layers"):
        keep_layers(teacher, 1)
    encoder, ids = Encoder().eval(), torch.randint(0, 31, (2, 9))
    assert blocks_of(encoder)[0] == "body.layers"
    student = keep_layers(encoder, 1).eval()
    assert student(ids).shape == encoder(ids).shape
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in encoder.parameters()
    )
    kept = student.body.layers[0].linear1.weight
    assert torch.equal(kept, encoder.body.layers[1].linear1.weight)
    assert kept is not encoder.body.layers[1].linear1.weight
    for wrong in (0, 2):
        with pytest.raises(errors.UsageError, match="fewer layers"):
            keep_layers(encoder, wrong)


def test_a_transformer_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=4, n_head=2)
    teacher = GPT2LMHeadModel(config).eval()
    student = keep_layers(teacher, 2).eval()
    ids = torch.randint(0, 31, (2, 9))
    assert student(ids).logits.shape == (2, 9, 31)
    assert student.config.n_layer == 2
    assert teacher.config.n_layer == 4
    # With a cache each layer must know its place.
    out = student.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 12)
    pairs = [(m.student, m.teacher) for m in layer_map(student, teacher)]
    assert pairs == [("transformer.h.0", "transformer.h.0"), ("transformer.h.1", "transformer.h.3")]


def networks() -> tuple[nn.Module, nn.Module]:
    student = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(),
                            nn.Linear(192, 10))  # fmt: skip
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Flatten(), nn.Linear(128, 10))  # fmt: skip
    return student, teacher


def matched(*matches: Match) -> tuple[Matched, dict]:
    student, teacher = networks()
    x = torch.randn(4, 1, 8, 8)
    ours, theirs = [m.student for m in matches], [m.teacher for m in matches]
    with torch.no_grad(), listening(student, ours) as a, listening(teacher, theirs) as b:
        student(x)
        teacher(x)
    return Matched(student, matches, a, b), b


def test_features_of_other_sizes_are_projected_and_pooled():
    made, theirs = matched(Match("0", "2"), Match("1", "1", "attention", 3.0))
    assert isinstance(made.projections[0], nn.Linear)
    assert isinstance(made.projections[1], nn.Identity)
    x = torch.randn(4, 1, 8, 8)
    answer = made(x)
    assert isinstance(answer, Taught)
    assert [tuple(f.shape) for f in answer.features] == [(4, 8, 8, 8), (4, 3, 8, 8)]
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = made.loss(made(x).features, theirs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert made.projections[0].weight.grad is not None
    made.eval()
    assert torch.equal(made(x), made.student(x))
    assert not made.student[0]._forward_hooks


def test_what_cannot_be_matched():
    student, _ = networks()
    with pytest.raises(errors.UsageError, match="no such module"), listening(student, ["9"]):
        pass
    with pytest.raises(errors.InputError, match="cannot be made alike"):
        matched(Match("0", "4"))
    with pytest.raises(errors.InputError, match="cannot be made alike"):
        matched(Match("3", "4", "attention"))
    with pytest.raises(errors.UsageError, match="unknown kind"):
        Match("0", "0", "logits")
    with pytest.raises(errors.UsageError, match="weight of a match"):
        Match("0", "0", weight=-1)
