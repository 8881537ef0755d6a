"""Intervals of medians and of their ratios, by the bootstrap, and what may be called faster.

A *series* is an array ``[starts, rounds]``: the milliseconds of each round of each start, a start
being a fresh process. The series of two contenders are *paired*: in each round both were timed, one
right after the other, so that what slowed one down slowed the other down too.

The bootstrap (Efron 1979) draws many series of the same size out of the one that was measured and
looks how much their medians differ. Drawn are starts, and in each of them blocks of consecutive
rounds (the circular block bootstrap of Politis and Romano 1992): neighbours in time are alike on a
machine that drifts, and rounds that are drawn one by one would make the intervals too narrow.
Of two contenders the same rounds are drawn, which keeps the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Series = Sequence[Sequence[float]] | np.ndarray[Any, np.dtype[np.float64]]

# A second run's median has an error of its own, and lies within 2.58 standard errors of the first
# one's, the interval of this level, in 93 % of all cases (of 95 %, in 83 %).
LEVEL = 0.99
RESAMPLES = 2000
SEED = 0
# Of fewer rounds, no interval says anything.
MIN_ROUNDS = 5
# By how much a median changes when the same process is started again (where its memory and its
# threads come to lie), which no number of rounds shows. Every stated interval is wider by this.
RESTART = 0.02
# Values that are drawn at a time.
_CHUNK = 1 << 20

FASTER, SLOWER, SAME = "faster", "slower", "not distinguishable"


@dataclass(frozen=True)
class Interval:
    """A figure, and between what it lies."""

    value: float
    low: float
    high: float

    def widened(self, share: float = RESTART) -> Interval:
        """With both ends further out by ``share``."""
        return Interval(self.value, self.low / (1 + share), self.high * (1 + share))

    @property
    def verdict(self) -> str:
        """What may be said of a ratio of speeds: nothing, if the interval includes 1."""
        if self.low > 1:
            return FASTER
        return SLOWER if self.high < 1 else SAME


def as_series(values: Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``values`` as an array ``[starts, rounds]``; ValueError for what is none, or too short."""
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 2 or series.size < MIN_ROUNDS or not np.isfinite(series).all():
        raise ValueError(f"a series is [starts, rounds], {MIN_ROUNDS} finite values at least")
    return series


def draws(
    starts: int, rounds: int, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Iterator[np.ndarray[Any, np.dtype[np.intp]]]:
    """What the bootstrap draws: indices ``[some, starts * rounds]`` into a flat series, a number of
    resamples at a time.

    Blocks have the cube root of ``rounds`` as their length, the order at which the error of the
    variance is least (Künsch 1989).
    """
    random = np.random.default_rng(seed)
    length = max(1, round(rounds ** (1 / 3)))
    blocks = -(-rounds // length)
    step = max(1, _CHUNK // (starts * rounds))
    for done in range(0, resamples, step):
        some = min(step, resamples - done)
        start = random.integers(0, starts, (some, starts, 1))
        first = random.integers(0, rounds, (some, starts, blocks, 1))
        inside = (first + np.arange(length)) % rounds
        inside = inside.reshape(some, starts, -1)[:, :, :rounds]
        yield (start * rounds + inside).reshape(some, -1)


def median_interval(values: Series, *, level: float = LEVEL, **drawn: int) -> Interval:
    """The median of a series, and its interval of the ``level``.

    ``drawn`` are the keywords of :func:`draws`.
    """
    series = as_series(values)
    return _between(float(np.median(series)), _medians(series, **drawn), level)


def ratio_interval(
    reference: Series, values: Series, *, level: float = LEVEL, **drawn: int
) -> Interval:
    """How many times as fast as the ``reference`` the other one is: the ratio of the medians of
    two paired series, and its interval.

    Raises ValueError if they are not paired, which is of one shape.
    """
    slow, fast = as_series(reference), as_series(values)
    if slow.shape != fast.shape:
        raise ValueError(f"not paired: {slow.shape} and {fast.shape}")
    a, b = slow.ravel(), fast.ravel()
    found = [
        np.median(a[index], axis=1) / np.median(b[index], axis=1)
        for index in draws(*slow.shape, **drawn)
    ]
    return _between(float(np.median(a) / np.median(b)), np.concatenate(found), level)


def separate_ratio(
    reference: Series, values: Series, *, level: float = LEVEL, seed: int = SEED, **drawn: int
) -> Interval:
    """:func:`ratio_interval` of series that are not paired: of two runs, each drawn on its own."""
    slow, fast = as_series(reference), as_series(values)
    a, b = _medians(slow, seed=seed, **drawn), _medians(fast, seed=seed + 1, **drawn)
    return _between(float(np.median(slow) / np.median(fast)), a / b, level)


def _medians(series: np.ndarray[Any, Any], **drawn: int) -> np.ndarray[Any, Any]:
    """Those of all that is drawn out of a series."""
    flat = series.ravel()
    found = [np.median(flat[index], axis=1) for index in draws(*series.shape, **drawn)]
    return np.concatenate(found)


def _between(value: float, found: np.ndarray[Any, Any], level: float) -> Interval:
    """The percentile interval; the figure itself is always inside."""
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(value, float(low)), max(value, float(high)))
