"""Sparse weights against slow loops, and compensation against the exact least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qkit.algorithms import Stats
from qkit.algorithms.compensate import DAMP
from qkit.algorithms.sparse import Sparsity, kept, sparsegpt, wanda
from qkit.errors import UsageError


def stats_of(x: torch.Tensor) -> Stats:
    stats = Stats.empty(1, x.shape[1])
    stats.update(x[None])
    return stats


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("columns", [16, 19])
def test_n_of_m_against_a_loop(n, m, columns):
    scores = torch.rand(5, columns)
    mask = kept(scores, Sparsity.parse(f"{n}:{m}", "layer"))
    for row, kept_row in zip(scores.numpy(), mask.numpy(), strict=True):
        for start in range(0, columns, m):
            part = row[start : start + m]
            slow = np.zeros(len(part), bool)
            slow[np.argsort(-part)[:n]] = True
            np.testing.assert_array_equal(kept_row[start : start + m], slow)


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_shares_are_exact_even_where_all_scores_are_equal(scope):
    mask = kept(torch.ones(4, 10), Sparsity.parse(0.3, scope))
    assert int(mask.sum()) == 28
    if scope == "row":
        assert (mask.sum(1) == 7).all()


def test_wanda_is_the_magnitude_of_what_a_weight_adds():
    x, weight = torch.randn(50, 6), torch.randn(3, 6)
    slow = np.abs(weight.numpy()) * np.sqrt((x.numpy() ** 2).mean(0))
    np.testing.assert_allclose(wanda(weight, stats_of(x)), slow, rtol=1e-5)


def test_sparsegpt_of_one_row_is_the_least_squares_of_its_last_columns():
    # With one weight to zero, compensation solves for all later columns exactly: minimize
    # (w - q)^T H (w - q) over them.
    torch.manual_seed(0)
    x = torch.randn(200, 5) @ torch.randn(5, 5)
    weight = torch.randn(1, 5)
    weight[0, 1] = 1e-3  # the one that goes
    new = sparsegpt(weight, Sparsity.parse(0.2, "layer"), stats_of(x))
    assert new[0, 1] == 0
    h = (x.T @ x / len(x)).double()
    h += torch.eye(5, dtype=torch.float64) * DAMP * h.diagonal().mean()
    later = [2, 3, 4]
    change = torch.linalg.solve(h[later][:, later], h[later, 1] * float(weight[0, 1]))
    expected = weight[0, later].double() + change
    torch.testing.assert_close(new[0, later].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amount", [0.5, "2:4"])
def test_sparsegpt_loses_less_than_wanda_and_magnitude(amount):
    torch.manual_seed(0)
    x = torch.randn(600, 160) @ (torch.randn(160, 160) * 0.3 + torch.eye(160))
    weight, stats = torch.randn(32, 160), stats_of(x)
    sparsity = Sparsity.parse(amount, "row")
    reference = x @ weight.T

    def loss(new: torch.Tensor) -> float:
        return float((x @ new.T - reference).square().mean())

    by_magnitude = weight * kept(weight.abs(), sparsity)
    by_wanda = weight * kept(wanda(weight, stats), sparsity)
    compensated = sparsegpt(weight, sparsity, stats)
    zeros = [float((t == 0).float().mean()) for t in (by_magnitude, by_wanda, compensated)]
    assert zeros == pytest.approx([0.5] * 3, abs=0.01)
    assert loss(compensated) < loss(by_wanda) < loss(by_magnitude)


@pytest.mark.parametrize("amount", [0, 1.0, float("nan"), "4:4", "0:4", "2:5", "half"])
def test_amounts_that_take_all_or_nothing_are_refused(amount):
    with pytest.raises(UsageError):
        Sparsity.parse(amount, "layer")


def test_an_unknown_scope_is_refused():
    with pytest.raises(UsageError, match="global"):
        Sparsity.parse(0.5, "model")
