"""Fitted codebooks: optimal where it is said, equal to brute force, and shared with gradients."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import blocks_of, nearest_oracle

from qkit.errors import InputError, UsageError
from qkit.numerics import kmeans as kmeans_module
from qkit.numerics.codebook import assign, cluster_means, fit_codebook, lookup
from qkit.numerics.kmeans import Points, kmeans, lloyd
from qkit.spec import PerBlock, PerChannel, PerGroup, PerTensor, PerToken

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerGroup(4),
    PerGroup(5, axis=0),
    PerBlock((4, 3)),
    PerToken(),
]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(values: np.ndarray, weights: np.ndarray, centers: np.ndarray) -> float:
    return float((weights * ((values[:, None] - centers) ** 2).min(1)).sum())


def best_cost(values: np.ndarray, weights: np.ndarray, k: int) -> float:
    """The least cost over all ways to cut the ascending ``values`` into ``k`` runs."""
    best = math.inf
    for cuts in itertools.combinations(range(1, len(values)), k - 1):
        total = 0.0
        for start, end in itertools.pairwise([0, *cuts, len(values)]):
            v, w = values[start:end], weights[start:end]
            total += float((w * (v - np.average(v, weights=w)) ** 2).sum())
        best = min(best, total)
    return best


def error(x: torch.Tensor, entries: torch.Tensor, granularity=PerTensor()) -> float:  # noqa: B008
    decoded = lookup(assign(x, entries, granularity), entries, granularity)
    return float((decoded.double() - x.double()).square().sum())


# ---------------------------------------------------------------- the optimum

SOME = st.lists(st.integers(-1000, 1000), min_size=2, max_size=9, unique=True)


@given(SOME, st.integers(2, 6), st.sampled_from([1e-30, 0.37, 1e30]), st.integers(0, 99))
def test_no_partition_is_better(numbers, k, size, seed):
    values = np.sort(np.array(numbers, float)) * size
    weights = np.random.default_rng(seed).uniform(0.1, 5, len(values))
    centers = kmeans(values, weights, k)
    if len(values) <= k:
        assert centers is values
        return
    assert len(centers) == k
    assert (np.diff(centers) > 0).all()
    assert cost(values, weights, centers) <= best_cost(values, weights, k) * (1 + 1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_clusters_that_anyone_can_see(offset):
    values = np.concatenate([c + np.linspace(-0.1, 0.1, 20) for c in (-5, 0, 1, 40)]) + offset
    centers = kmeans(values, np.ones(len(values)), 4)
    np.testing.assert_allclose(centers - offset, [-5, 0, 1, 40], atol=1e-8)


@pytest.mark.parametrize("k", [2, 3, 12])
def test_every_row_of_the_recursion_equals_the_plain_one(k):
    rng = np.random.default_rng(k)
    values, weights = np.sort(rng.standard_normal(120)), rng.uniform(0.1, 2, 120)
    points, n = Points(values, weights), 120
    best = [points.cost(np.array(0), np.array(i)) for i in range(n + 1)]
    for _ in range(k - 1):
        best = [
            min(best[m] + points.cost(np.array(m), np.array(i)) for m in range(i + 1))
            for i in range(n + 1)
        ]
    want = float(best[n]) * points.size**2 * weights.sum()
    assert cost(values, weights, kmeans(values, weights, k)) == pytest.approx(want, rel=1e-9)


def test_no_step_of_lloyd_raises_the_cost(monkeypatch):
    monkeypatch.setattr(kmeans_module, "MAX_LLOYD", 1)
    rng = np.random.default_rng(0)
    values, weights = np.sort(rng.standard_normal(3000) ** 3), rng.uniform(0, 1, 3000)
    points, centers = Points(values, weights), np.sort(rng.uniform(-3, 3, 16))
    costs = [cost(values, weights, centers)]
    for _ in range(60):
        centers = lloyd(points, centers)
        costs.append(cost(values, weights, centers))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("k", [2, 16, 100])
@pytest.mark.parametrize("shape", ["normal", "cubed", "uniform", "one outlier"])
def test_many_points_come_near_the_optimum(shape, k, monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, 5000) if shape == "uniform" else rng.standard_normal(5000)
    x = x**3 if shape == "cubed" else x
    x[7] = 1e6 if shape == "one outlier" else x[7]
    values, weights = np.sort(x), np.ones(5000)
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", 1000)
    near = cost(values, weights, kmeans(values, weights, k))
    monkeypatch.setattr(kmeans_module, "MAX_EXACT", 5000)
    assert near <= cost(values, weights, kmeans(values, weights, k)) * 1.01


# ---------------------------------------------------------------- tensors


@granularities
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_each_block_is_clustered_alone(granularity, dtype):
    x = randn(7, 13).to(dtype)
    entries = fit_codebook(x, 4, granularity=granularity)
    codes = assign(x, entries, granularity)
    assert entries.shape == (*granularity.scale_shape((7, 13)), 4)
    assert entries.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
    decoded = lookup(codes, entries, granularity)
    for block, inside in blocks_of((7, 13), granularity.block_shape((7, 13))):
        own = entries[block]
        alone = fit_codebook(torch.stack([x[i] for i in inside]), 4)
        assert torch.equal(own, alone.flatten())
        for i in inside:
            assert int(codes[i]) == nearest_oracle(float(x[i]), own.tolist(), floats=False)
            assert decoded[i] == own[int(codes[i])]


@granularities
def test_importance_is_repetition(granularity):
    """The importance 3 is the value three times; along an axis that no block is cut by."""
    x, times = randn(8, 12), torch.randint(0, 4, (8, 12))
    times[:, 0] += 1
    entries = fit_codebook(x, 3, times.float(), granularity)
    for block, inside in blocks_of((8, 12), granularity.block_shape((8, 12))):
        values = [x[i] for i in inside for _ in range(int(times[i]))]
        if values:
            want = fit_codebook(torch.stack(values), 3).flatten()
            torch.testing.assert_close(entries[block], want, rtol=1e-6, atol=1e-7)


def test_importance_lowers_the_weighted_error():
    x, importance = randn(64, 64), randn(1, 64, seed=1).exp().square()
    plain, aware = fit_codebook(x, 8), fit_codebook(x, 8, importance)

    def weighted(entries: torch.Tensor) -> float:
        return float(((lookup(assign(x, entries), entries) - x).square() * importance).sum())

    assert weighted(aware) < weighted(plain)
    assert error(x, plain) < error(x, aware)


def test_a_block_without_importance_is_clustered_all_the_same():
    x = randn(2, 10)
    importance = torch.tensor([[0.0], [1.0]])
    both = fit_codebook(x, 3, importance, PerGroup(4))
    assert torch.equal(both, fit_codebook(x, 3, None, PerGroup(4)))


def test_fewer_distinct_values_than_entries():
    x = torch.tensor([3.0, -1.0, 3.0, 0.5])
    entries = fit_codebook(x, 5)
    assert entries.tolist() == [[-1.0, 0.5, 3.0, 3.0, 3.0]]
    assert assign(x, entries).tolist() == [2, 0, 2, 1]
    assert fit_codebook(torch.zeros(3, 3), 2).tolist() == [[[0.0, 0.0]]]
    assert fit_codebook(torch.tensor(7.0), 2).tolist() == [7.0, 7.0]


def test_more_entries_cost_no_more():
    x = randn(40, 40)
    errors = [error(x, fit_codebook(x, k)) for k in (2, 3, 4, 8, 16, 32, 64, 128, 256)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_better_than_even_spacing_and_than_nf4():
    x = randn(1 << 12)
    fitted = error(x, fit_codebook(x, 16))
    even = torch.linspace(float(x.min()), float(x.max()), 16).unsqueeze(0)
    assert fitted < 0.6 * error(x, even)


@pytest.mark.parametrize("k", [16, 256])
def test_a_large_tensor_comes_near_the_optimum(k):
    """70000 values are binned; the same without bins, and without merging, is hardly better."""
    x = randn(70, 1000)
    entries = fit_codebook(x, k)
    values = np.unique(x.double().numpy())
    exact = torch.from_numpy(kmeans(values, np.ones(len(values)), k)).reshape(1, 1, -1)
    assert error(x, entries) <= error(x.double(), exact) * 1.001


def test_bins_do_not_lose_distinct_values_of_narrow_types():
    x = torch.arange(256, dtype=torch.float32).repeat(300).to(torch.bfloat16)
    assert fit_codebook(x, 256).flatten().tolist() == list(range(256))


def test_a_large_sparse_tensor_counts_beyond_the_precision_of_fp32():
    x = torch.zeros(1 << 17)
    x[:2] = torch.tensor([1.0, -1.0])
    entries = fit_codebook(x, 2, torch.full_like(x, 2.0**10 + 2.0**-10))
    assert entries.flatten().tolist() == pytest.approx([-1.0, 1 / (2**17 - 1)], rel=1e-6)


def test_deterministic_and_independent_of_threads():
    x, threads = randn(300, 300), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(fit_codebook(x, 16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(fit_codebook(x.t().contiguous().t(), 16), results[0])


def test_sixteen_million_weights_take_two_seconds_at_most():
    """Of the processor: others may want the cores at the same time."""
    x = randn(4096, 4096)
    start = time.process_time()
    fit_codebook(x, 16)
    assert time.process_time() - start < 2


@granularities
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_tensor(shape, granularity):
    x = torch.empty(shape)
    entries = fit_codebook(x, 4, granularity=granularity)
    assert entries.shape == (*granularity.scale_shape(shape), 4)
    assert assign(x, entries, granularity).shape == shape


@pytest.mark.parametrize("k", [-1, 0, 1, 257])
def test_other_numbers_of_entries_are_refused(k):
    with pytest.raises(UsageError, match="2 to 256"):
        fit_codebook(randn(4), k)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.tensor([1.0, -1.0]), "not negative"),
        (torch.tensor([1.0, math.nan]), "1 NaN"),
        (torch.ones(3), "not the shape"),
    ],
)
def test_impossible_importance_is_refused(importance, message):
    with pytest.raises(InputError, match=message):
        fit_codebook(torch.ones(4, 2), 2, importance)


def test_not_finite_is_refused_with_its_name():
    with pytest.raises(InputError, match=r"head\.weight.*1 NaN"):
        fit_codebook(torch.tensor([1.0, math.nan]), 2, name="head.weight")


def test_entries_of_another_tensor_are_refused():
    x = randn(4, 6)
    entries = fit_codebook(x, 4, granularity=PerChannel(0))
    with pytest.raises(UsageError, match="not the entries"):
        assign(x, entries)
    with pytest.raises(UsageError, match="not the entries"):
        lookup(assign(x, entries, PerChannel(0)), entries, PerGroup(2))


# ---------------------------------------------------------------- sharing


@granularities
def test_the_gradient_of_an_entry_is_the_sum_over_its_values(granularity):
    x = randn(7, 13).double()
    entries = fit_codebook(x, 4, granularity=granularity).requires_grad_()
    codes, upstream = assign(x, entries, granularity), randn(7, 13, seed=1).double()
    lookup(codes, entries, granularity).backward(upstream)
    want = torch.zeros_like(entries, requires_grad=False)
    for block, inside in blocks_of((7, 13), granularity.block_shape((7, 13))):
        for i in inside:
            want[block][int(codes[i])] += upstream[i]
    torch.testing.assert_close(entries.grad, want)
    assert torch.autograd.gradcheck(lambda e: lookup(codes, e, granularity), entries)


@granularities
def test_means_of_the_fitted_codes_are_the_fitted_entries(granularity):
    """The entries of an optimum are the means of their clusters."""
    x = randn(7, 13)
    entries = fit_codebook(x, 3, granularity=granularity)
    means = cluster_means(x, assign(x, entries, granularity), entries, granularity=granularity)
    torch.testing.assert_close(means, entries)


@granularities
def test_means_by_hand(granularity):
    x, importance = randn(7, 13), randn(7, 13, seed=1).abs()
    entries = fit_codebook(randn(7, 13, seed=2), 4, granularity=granularity)
    codes = assign(x, entries, granularity)
    means = cluster_means(x, codes, entries, importance, granularity)
    for block, inside in blocks_of((7, 13), granularity.block_shape((7, 13))):
        for place in range(4):
            own = [i for i in inside if codes[i] == place]
            total = sum(float(importance[i] * x[i]) for i in own)
            mass = sum(float(importance[i]) for i in own)
            want = total / mass if own else float(entries[block][place])
            assert float(means[block][place]) == pytest.approx(want, rel=1e-5)


def test_training_shared_entries_lowers_the_loss():
    x, target = randn(64, 16), randn(64, 8, seed=1)
    weight = torch.linalg.lstsq(x, target).solution.t().contiguous()
    entries = fit_codebook(weight, 4)
    codes, entries = assign(weight, entries), entries.requires_grad_()

    def loss() -> torch.Tensor:
        return (x @ lookup(codes, entries).t() - target).square().mean()

    before = float(loss().detach())
    optimizer = torch.optim.SGD([entries], lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < before


def test_inputs_are_not_modified():
    x, importance = randn(6, 8), randn(6, 8, seed=1).abs()
    kept = x.clone(), importance.clone()
    entries = fit_codebook(x, 4, importance, PerGroup(3))
    before = entries.clone()
    cluster_means(x, assign(x, entries, PerGroup(3)), entries, importance, PerGroup(3)).zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(importance, kept[1])
    assert torch.equal(entries, before)
