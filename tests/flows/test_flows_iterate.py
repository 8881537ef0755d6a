"""Prune and tune in steps: the schedule, the floor, and digits within a point of accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import BudgetError, UsageError
from qkit.flows.demo import accuracy, digits_cnn, load_digits
from qkit.flows.demo import train as train_digits
from qkit.flows.iterate import SCHEDULES, sparsify_iteratively


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))


def macs(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_steps_follow_the_schedule(net, schedule):
    whole, tuned = macs(net), []
    smaller, report = qkit.prune_iteratively(
        net, X, tune=lambda m: tuned.append(macs(m)), evaluate=lambda m: 0.0, amount=0.7, steps=4,
        schedule=schedule, round_to=1,
    )  # fmt: skip
    goals = [SCHEDULES[schedule](step / 4, 0.7) for step in range(1, 5)]
    assert goals[-1] == pytest.approx(0.7)
    for now, goal in zip(tuned, goals, strict=True):
        # Below the goal by less than a unit of the widest layer with all that it touches.
        assert (1 - goal) * whole - 130 <= now <= (1 - goal) * whole
    assert macs(smaller) == tuned[-1]
    assert report.before["macs"] == whole * len(X)
    assert report.after["macs"] == macs(smaller) * len(X)
    assert macs(net) == whole
    assert report.latency_ms["speedup"] > 0
    assert [row["step"] for row in report.history] == [0, 1, 2, 3, 4]


def test_zeros_of_each_layer_follow_the_schedule(net):
    tuned: list[list[float]] = []

    def tune(model: nn.Module) -> None:
        zeros = [model.get_submodule(n).weight.eq(0).float().mean().item() for n in "024"]
        tuned.append(zeros)

    sparsify_iteratively(
        net, {"0": 0.9, "2": 0.5}, tune=tune, evaluate=lambda m: 0.0, steps=3, schedule="geometric"
    )
    for step, (first, second, last) in enumerate(tuned, 1):
        assert first == pytest.approx(1 - 0.1 ** (step / 3), abs=1 / 512)
        assert second == pytest.approx(1 - 0.5 ** (step / 3), abs=1 / 4096)
        assert last == 0
    with pytest.raises(UsageError, match="not a pattern"):
        sparsify_iteratively(net, {"0": "2:4"}, tune=tune, evaluate=lambda m: 0.0)


def test_the_last_good_step_comes_out(net):
    whole = macs(net)
    smaller, report = qkit.prune_iteratively(
        net, X, tune=lambda m: None, evaluate=lambda m: macs(m) / whole, amount=0.8, steps=8,
        schedule="linear", floor=0.55, round_to=1,
    )  # fmt: skip
    assert 0.55 <= macs(smaller) / whole < 0.65
    assert [row["good"] for row in report.history] == [True] * 5 + [False]
    assert report.history[-1]["metric"] < 0.55


def test_a_drop_is_from_the_start(net):
    values = iter([0.9, 0.85, 0.7])
    _, report = qkit.prune_iteratively(
        net, X, tune=lambda m: None, evaluate=lambda m: next(values), steps=5, drop=0.1
    )
    assert [row["good"] for row in report.history] == [True, True, False]


def test_a_first_step_that_is_not_good_is_an_error(net):
    with pytest.raises(BudgetError, match="first step"):
        qkit.prune_iteratively(net, X, tune=lambda m: None, evaluate=lambda m: 0.0, floor=0.5)


def test_where_nothing_more_can_be_removed_the_last_step_comes_out(net):
    smaller, report = qkit.prune_iteratively(
        net, X, tune=lambda m: None, evaluate=lambda m: 0.0, amount=0.95, steps=3, keep=16
    )
    assert smaller[0].out_features >= 16
    assert "not enough" in report.history[-1]["reason"]


@pytest.mark.parametrize(
    "options",
    [{"amount": 1.0}, {"steps": 0}, {"schedule": "square"}, {"unit": "latency"},
     {"drop": 0.1, "floor": 0.5}],
)  # fmt: skip
def test_wrong_requests_are_refused_before_any_training(net, options):
    def never(model: nn.Module) -> float:
        raise AssertionError

    with pytest.raises(UsageError):
        qkit.prune_iteratively(net, X, tune=never, evaluate=never, **options)


@pytest.mark.slow
def test_digits_within_a_point_of_accuracy_with_a_fifth_of_the_work(tmp_path):
    """What is asked of prune-and-tune, with the accuracy of the untouched model beside it."""
    data = load_digits()
    torch.manual_seed(0)
    model = digits_cnn()
    train_digits(model, data, epochs=6)
    before = accuracy(copy.deepcopy(model), data)
    smaller, report = qkit.prune_iteratively(
        model,
        data.train_x[:64],
        amount=0.8,
        steps=3,
        drop=1.0,
        tune=lambda m: train_digits(m, data, epochs=4),
        evaluate=lambda m: accuracy(m, data),
    )
    shares = [f"{report.ratio['macs']:.1%}", f"{before:.2f} -> {accuracy(smaller, data):.2f}"]
    print("\ndigits pruned in steps, multiply-adds left and accuracy:", *shares)
    assert report.after["macs"] <= 0.2 * report.before["macs"]
    assert accuracy(smaller, data) >= before - 1.0
