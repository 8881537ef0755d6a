"""Bootstrap intervals: equal to slow loops, covering what they should, and honest about 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.report.statistics import (
    FASTER,
    LEVEL,
    RESTART,
    SAME,
    SLOWER,
    Interval,
    draws,
    median_interval,
    ratio_interval,
    separate_ratio,
)

FEW = {"resamples": 200}
SIZES = st.tuples(st.integers(1, 4), st.integers(5, 40))


def median(values: list[float]) -> float:
    ordered, n = sorted(values), len(values)
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation between the two nearest."""
    ordered = sorted(values)
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def series(seed: int, starts: int, rounds: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=(starts, rounds))


@given(SIZES, st.integers(0, 9))
def test_what_is_drawn_are_starts_and_in_them_blocks(size, seed):
    starts, rounds = size
    found = np.concatenate(list(draws(starts, rounds, resamples=20, seed=seed)))
    assert found.shape == (20, starts * rounds)
    length = max(1, round(rounds ** (1 / 3)))
    for resample in found:
        for part in resample.reshape(starts, rounds):
            assert len(set(part // rounds)) == 1
            steps = np.diff(part % rounds) % rounds
            inside = np.arange(1, rounds) % length != 0
            assert (steps[inside] == 1 % rounds).all()


def test_draws_are_the_same_each_time_and_come_in_pieces_of_any_size(monkeypatch):
    whole = np.concatenate(list(draws(2, 7, resamples=30, seed=3)))
    assert np.array_equal(whole, np.concatenate(list(draws(2, 7, resamples=30, seed=3))))
    assert not np.array_equal(whole, np.concatenate(list(draws(2, 7, resamples=30, seed=4))))
    monkeypatch.setattr("qkit.report.statistics._CHUNK", 14 * 8)
    pieces = list(draws(2, 7, resamples=30))
    assert [len(piece) for piece in pieces] == [8, 8, 8, 6]


@pytest.mark.parametrize("size", [(1, 5), (2, 8), (3, 11)])
def test_intervals_equal_the_slow_loops(size):
    a, b = series(1, *size), series(2, *size)
    flat_a, flat_b = a.ravel().tolist(), b.ravel().tolist()
    medians, ratios = [], []
    for index in np.concatenate(list(draws(*size, resamples=200))).tolist():
        first, second = (median([flat[i] for i in index]) for flat in (flat_a, flat_b))
        medians.append(first)
        ratios.append(first / second)
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    got = median_interval(a, **FEW)
    assert got.value == pytest.approx(median(flat_a))
    assert [got.low, got.high] == pytest.approx([quantile(medians, q) for q in ends])
    got = ratio_interval(a, b, **FEW)
    assert got.value == pytest.approx(median(flat_a) / median(flat_b))
    assert [got.low, got.high] == pytest.approx([quantile(ratios, q) for q in ends])


@given(SIZES, st.integers(0, 9), st.floats(0.01, 100))
def test_intervals_scale_with_the_times(size, seed, factor):
    a = series(seed, *size)
    one, other = median_interval(a, **FEW), median_interval(factor * a, **FEW)
    assert one.low <= one.value <= one.high
    wanted = [factor * x for x in (one.value, one.low, one.high)]
    assert [other.value, other.low, other.high] == pytest.approx(wanted)
    same = ratio_interval(a, a, **FEW)
    assert (same.value, same.low, same.high, same.verdict) == (1, 1, 1, SAME)
    twice = ratio_interval(factor * a, a, **FEW)
    assert [twice.low, twice.high] == pytest.approx([factor, factor])


def test_the_median_is_where_the_interval_says():
    """Of 200 series, 99 % should cover the true median; fewer than 94 % would be 7 sigma off."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        found = median_interval(random.lognormal(size=(1, 60)), resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert hits >= 188


def test_what_disturbs_both_is_no_difference():
    random = np.random.default_rng(0)
    drift = np.linspace(1, 2, 90) * random.lognormal(0, 0.3, 90)
    a = (drift * random.normal(1, 0.01, 90))[None]
    b = (1.1 * drift * random.normal(1, 0.01, 90))[None]
    paired = ratio_interval(b, a)
    assert paired.verdict == FASTER
    assert paired.value == pytest.approx(1.1, rel=0.05)
    strangers = ratio_interval(random.permutation(b.ravel())[None], a)
    assert strangers.verdict == SAME
    assert paired.high - paired.low < (strangers.high - strangers.low) / 4


def test_neighbours_that_are_alike_count_for_less():
    random, value, rows = np.random.default_rng(0), 0.0, []
    for _ in range(216):
        value = 0.9 * value + random.normal()
        rows.append(10 + value)
    alike = median_interval([rows])
    shuffled = median_interval(random.permutation(rows)[None])
    assert alike.high - alike.low > 1.5 * (shuffled.high - shuffled.low)


def test_starts_that_differ_are_inside_the_interval():
    random = np.random.default_rng(0)
    both = np.stack([random.normal(10, 0.01, 50), random.normal(11, 0.01, 50)])
    found = median_interval(both)
    assert found.low < 10.02
    assert found.high > 10.98


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.01, 1.2, FASTER),
        (0.7, 0.99, SLOWER),
        (0.99, 1.01, SAME),
        (1.0, 1.5, SAME),
        (0.5, 1.0, SAME),
        (0.9, 40.0, SAME),
    ],
)
def test_an_interval_with_1_is_no_win(low, high, verdict):
    assert Interval(1.1, low, high).verdict == verdict


def test_a_restart_may_explain_small_differences():
    least = 1 + RESTART / 2
    assert Interval(least, least, least).verdict == FASTER
    assert Interval(least, least, least).widened().verdict == SAME
    wide = Interval(2.0, 1.8, 2.2).widened(0.1)
    assert (wide.value, wide.low, wide.high) == pytest.approx((2.0, 1.8 / 1.1, 2.42))


@pytest.mark.parametrize(
    "values", [[], [[]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5], [[1, 2, 3, 4, math.nan]]]
)
def test_no_series(values):
    with pytest.raises(ValueError, match="series"):
        median_interval(values)


def test_no_pairs():
    with pytest.raises(ValueError, match="paired"):
        ratio_interval(np.ones((1, 6)), np.ones((2, 3)))


@given(SIZES, SIZES, st.integers(0, 9))
def test_the_ratio_of_two_runs_is_that_of_a_slow_loop(before, after, seed):
    a, b = series(seed, *before), series(seed + 1, *after)
    drawn = []
    for run, of in ((a, 3), (b, 4)):
        flat = run.ravel()
        indices = np.concatenate(list(draws(*run.shape, seed=of, **FEW)))
        drawn.append([median([float(flat[i]) for i in row]) for row in indices])
    ratios = [x / y for x, y in zip(*drawn, strict=True)]
    found = separate_ratio(a, b, seed=3, **FEW)
    value = median(list(a.ravel())) / median(list(b.ravel()))
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(min(value, quantile(ratios, (1 - LEVEL) / 2)))
    assert found.high == pytest.approx(max(value, quantile(ratios, (1 + LEVEL) / 2)))


def test_two_runs_of_which_nothing_changed_are_seldom_told_apart():
    told = sum(
        separate_ratio(series(i, 1, 60), series(1000 + i, 1, 50), **FEW).verdict != SAME
        for i in range(100)
    )
    # An interval of 99 % by the bootstrap of few rounds is a little too narrow.
    assert told <= 6
