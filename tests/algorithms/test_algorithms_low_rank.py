"""Low-rank factors: optimal by theorem, exact at full rank, aware of data, within a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qkit.algorithms.low_rank import Spectrum, cp, pair, spectrum, tucker
from qkit.algorithms.ranks import Costs, allocate

# fp64 inside; what is left is the rounding of the fp32 factors and their product.
EXACT = 1e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("data", [False, True])
def test_full_rank_is_exact(shape, data):
    w = torch.randn(shape)
    x = torch.randn(3, shape[1])  # fewer vectors than directions
    a, b = pair(w, spectrum(w, x.T @ x / 3 if data else None), min(shape))
    assert relative(b @ a, w) < EXACT


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_without_data_it_is_the_truncated_svd(shape):
    w = torch.randn(shape)
    found = spectrum(w)
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    for rank in (1, 4, 8):
        a, b = pair(w, found, rank)
        want = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert relative(b @ a, torch.from_numpy(want).float()) < EXACT
        lost = float((b @ a - w).square().sum()) / float(w.square().sum())
        assert 1 - found.kept(rank) == pytest.approx(lost, rel=1e-4)
    np.testing.assert_allclose(found.energy, s**2)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_with_data_the_error_on_them_is_the_least(shape):
    """Whitening by a Cholesky factor, truncating and going back is the other way to the optimum."""
    w = torch.randn(shape)
    x = torch.randn(400, shape[1]) @ torch.diag(torch.logspace(0, -2, shape[1]))
    moment = x.T @ x / 400
    root = np.linalg.cholesky(moment.double().numpy())
    u, s, v = np.linalg.svd(w.double().numpy() @ root, full_matrices=False)
    plain = spectrum(w)
    for rank in (2, 5):
        a, b = pair(w, spectrum(w, moment), rank)
        error = (x @ (b @ a - w).T).square().mean()
        best = torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)).float()
        # The damping of the moment is 1e-4 of its mean.
        assert error <= (x @ (best - w).T).square().mean() * 1.01
        a, b = pair(w, plain, rank)
        assert error < 0.9 * (x @ (b @ a - w).T).square().mean()


def test_the_factors_share_their_size():
    w = torch.randn(12, 8) * 1000
    a, b = pair(w, spectrum(w), 5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    zero = torch.zeros(3, 4)
    a, b = pair(zero, spectrum(zero), 2)
    assert torch.equal(b @ a, zero)


def test_ranks_by_energy():
    found = Spectrum(torch.eye(4), torch.tensor([8.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    ranks = {share: found.rank_of(share) for share in (0.1, 0.8, 0.81, 0.9, 0.91, 1.0)}
    assert ranks == {0.1: 1, 0.8: 1, 0.81: 2, 0.9: 2, 0.91: 3, 1.0: 3}
    assert found.kept(2) == 0.9


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
def test_tucker_and_cp(kernel):
    w = torch.randn(6, 5, *kernel)
    first, core, last = tucker(w, (6, 5))
    assert relative(torch.einsum("op,pq...,qi->oi...", last, core, first), w) < EXACT
    # A tensor of rank 2 is found again.
    letters = "abcde"[: w.ndim]
    parts = [torch.randn(n, 2) for n in w.shape]
    formula = ",".join(f"{x}r" for x in letters) + f"->{letters}"
    low = torch.einsum(formula, *parts)
    found = cp(low, 2)
    assert [f.shape for f in found] == [p.shape for p in parts]
    assert relative(torch.einsum(formula, *found), low) < 1e-3  # alternating: near, not exact
    assert all(torch.equal(x, y) for x, y in zip(found, cp(low, 2), strict=True))


def spectra(*energies: list[float]) -> dict[str, Spectrum]:
    return {
        str(i): Spectrum(torch.eye(len(e)), torch.tensor(e, dtype=torch.float64))
        for i, e in enumerate(energies)
    }


@pytest.mark.parametrize("budget", range(6, 40, 3))
def test_the_budget_is_spent_best(budget):
    """Against all ranks: no other choice within the budget keeps more, but for the last step."""
    rng = np.random.default_rng(budget)
    energies = [sorted(rng.random(5), reverse=True) for _ in range(3)]
    found = spectra(*energies)
    costs = {name: Costs(1000, 2) for name in found}
    ranks = allocate(found, costs, budget)

    def kept(choice: tuple[int, ...]) -> float:
        return sum(found[str(i)].kept(rank) for i, rank in enumerate(choice))

    fit = [c for c in itertools.product(range(1, 6), repeat=3) if 2 * sum(c) <= budget]
    best = max(fit, key=kept)
    ours = tuple(ranks[str(i)] for i in range(3))
    assert 2 * sum(ours) <= budget
    assert kept(ours) == pytest.approx(kept(best))  # equal costs: greedy is exact


def test_layers_that_would_not_shrink_stay_and_free_nothing_for_others():
    found = spectra([5.0, 0.1, 0.1], [1.0, 1.0, 1.0])
    costs = {"0": Costs(100, 10), "1": Costs(12, 6)}
    ranks = allocate(found, costs, 62)
    assert ranks["1"] is None or ranks["1"] * 6 < 12
    assert sum(costs[n].of(r) for n, r in ranks.items()) <= 62
    assert allocate(spectra([1.0]), {"0": Costs(5, 9)}, 3) == {"0": None}


def test_weights_move_the_budget():
    found = spectra([1.0] * 6, [1.0] * 6)
    costs = {name: Costs(100, 10) for name in found}
    even, odd = allocate(found, costs, 80), allocate(found, costs, 80, {"1": 5.0})
    assert sum(even.values()) == sum(odd.values()) == 8
    assert odd["1"] > odd["0"]
