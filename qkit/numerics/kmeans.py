"""One-dimensional k-means of weighted points, to the optimum.

The cost is ``sum_i w_i (v_i - c(i))^2`` with ``c(i)`` the centre nearest to ``v_i``. In one
dimension the clusters are intervals, so that prefix sums give the cost of any cluster in O(1) and
dynamic programming the best ``k`` of them (Wang & Song 2011, Ckmeans.1d.dp, The R Journal 3/2)::

    D[j][i] = min over m <= i of  D[j - 1][m] + cost(m, i)

The least optimal ``m`` does not decrease with ``i``, so each of the ``k`` rows takes
O(n log n) by divide and conquer (Gronlund et al. 2017, arXiv 1701.07204, section 2). More than
``MAX_EXACT`` points are first merged to that many, and the optimum of these is the seed of
Lloyd's iterations over all of them (Lloyd 1982, Least squares quantization in PCM), of which no
step raises the cost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.intp]

MAX_EXACT = 4096
MAX_LLOYD = 1000


class Points:
    """Ascending distinct values and their weights, with prefix sums around the weighted mean."""

    def __init__(self, values: Array, weights: Array) -> None:
        self.values, self.weights = values, weights
        self.center = np.average(values, weights=weights)
        self.size = max(float(np.abs(values - self.center).max()), np.finfo(float).tiny)
        v, w = (values - self.center) / self.size, weights / weights.sum()
        self.mass, self.sum, self.square = (
            np.concatenate([[0.0], np.cumsum(term)]) for term in (w, w * v, w * v * v)
        )

    def cost(self, start: Places, end: Places) -> Array:
        """The relative cost of the clusters ``[start, end)``."""
        mass, total = self.mass[end] - self.mass[start], self.sum[end] - self.sum[start]
        spread = self.square[end] - self.square[start]
        spread -= np.divide(total * total, mass, out=np.zeros_like(mass), where=mass > 0)
        return np.maximum(spread, 0.0)

    def means(self, borders: Places) -> Array:
        """The weighted mean between neighbouring ``borders``; NaN of an empty cluster."""
        mass, total = np.diff(self.mass[borders]), np.diff(self.sum[borders])
        mean = np.divide(total, mass, out=np.full_like(mass, np.nan), where=mass > 0)
        return mean * self.size + self.center


def kmeans(values: Array, weights: Array, k: int) -> Array:
    """At most ``k`` ascending distinct centres for the ascending distinct ``values``.

    ``weights`` (``[n]``, as ``values``) are positive and finite. With no more than ``k`` values
    these are the answer, exactly; with up to ``MAX_EXACT`` the answer is optimal.
    """
    if len(values) <= k:
        return values
    points = Points(values, weights)
    if len(values) <= MAX_EXACT:
        return _distinct(points.means(_optimal_borders(points, k)))
    seeds = Points(*_merged(points, MAX_EXACT))
    return lloyd(points, _distinct(seeds.means(_optimal_borders(seeds, k))))


def lloyd(points: Points, centers: Array) -> Array:
    """``centers`` moved to the means of their clusters until none moves; the tie goes down."""
    for _ in range(MAX_LLOYD):
        middles = centers[:-1] / 2 + centers[1:] / 2
        inner = np.searchsorted(points.values, middles, side="right")
        means = points.means(np.concatenate([[0], inner, [len(points.values)]]))
        means = _distinct(np.where(np.isnan(means), centers, means))
        if np.array_equal(means, centers):
            break
        centers = means
    return centers


def _distinct(centers: Array) -> Array:
    """``centers`` without those of empty clusters and without repetitions, ascending."""
    return np.unique(centers[~np.isnan(centers)])


def _merged(points: Points, n: int) -> tuple[Array, Array]:
    """Neighbours merged to about ``n`` points, as dense as the centres of many clusters would be.

    That is as the cube root of the density (Panter & Dite 1951, Quantization distortion in
    pulse-count modulation): a point of weight w at a distance d takes a share of w^1/3 d^2/3.
    """
    values = points.values
    gaps = np.diff(values, prepend=2 * values[0] - values[1]) / (values[-1] - values[0])
    size = np.cbrt(points.weights * gaps * gaps)
    scale = n / size.sum()
    for _ in range(8):  # no point takes more than one place: those of an outlier are shared out
        scale *= n / np.minimum(size * scale, 1.0).sum()
    place = np.cumsum(np.minimum(size * scale, 1.0)).astype(np.intp)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    weights = np.add.reduceat(points.weights, starts)
    means = np.add.reduceat(points.weights * (values - points.center), starts) / weights
    return means + points.center, weights


def _optimal_borders(points: Points, k: int) -> Places:
    """The ``k + 1`` borders of the best ``k`` clusters; some may be empty."""
    n = len(points.values)
    everything = np.arange(n + 1)
    best = points.cost(np.zeros_like(everything), everything)
    splits = []
    for _ in range(k - 1):
        best, split = _row(points, best)
        splits.append(split)
    borders = [n]
    for split in reversed(splits):
        borders.append(int(split[borders[-1]]))
    return np.array([0, *reversed(borders)])


def _row(points: Points, previous: Array) -> tuple[Array, Places]:
    """``D[j]`` and the least optimal ``m`` of each of its entries, from ``D[j - 1]``.

    Level by level: the entries at odd multiples of ``step`` lie between two at multiples of
    ``2 * step``, whose optima bound the search; all of a level are searched in one array.
    """
    n = len(previous) - 1
    best, split = np.zeros(n + 1), np.zeros(n + 1, np.intp)
    step = 1 << (n.bit_length() - 1)
    while step:
        at = np.arange(step, n + 1, 2 * step)
        low = split[at - step]
        above = np.minimum(at + step, n)
        high = np.where(at + step <= n, split[above], at)
        high = np.minimum(high, at)
        counts = high - low + 1
        firsts = np.cumsum(counts) - counts
        m = np.arange(counts.sum()) - np.repeat(firsts - low, counts)
        cost = previous[m] + points.cost(m, np.repeat(at, counts))
        best[at] = np.minimum.reduceat(cost, firsts)
        hits = np.flatnonzero(cost == np.repeat(best[at], counts))
        split[at] = m[hits[np.searchsorted(hits, firsts)]]
        step //= 2
    return best, split
