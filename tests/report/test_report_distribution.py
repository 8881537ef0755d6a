"""Histograms before and after rounding, against numpy's, on the grid of the codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qkit.numerics import choose_qparams, dequantize, quantize
from qkit.report.distribution import (
    BEYOND,
    DRAWN,
    SHOWN,
    distribution,
    in_steps,
    least_exact,
    levels_of,
)
from qkit.spec import parse


def of(name: str, x: torch.Tensor):
    spec = parse(name).weight
    qparams = choose_qparams(x, spec)
    rounded = dequantize(quantize(x, qparams, spec))
    sides = [in_steps(each, qparams, spec) for each in (x, rounded)]
    return spec, sides, distribution("w", "it", *sides, levels_of(spec))


@pytest.mark.parametrize(
    "name", ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w2a16-g32", "w1a16-asym", "nf4", "mxfp4",
             "fp8-channel"]
)  # fmt: skip
def test_beside_numpy(name):
    x = torch.randn(24, 80, generator=torch.Generator().manual_seed(3))
    spec, (before, after), found = of(name, x)
    cells = len(found.before)
    sides = found.first + found.width * np.arange(cells + 1)
    counted, _ = np.histogram(np.clip(before.numpy(), sides[0], np.nextafter(sides[-1], 0)), sides)
    want = counted / counted.sum() / found.width
    # A value on the border of two cells may fall to either side in fp32.
    assert np.abs(np.array(found.before) - want).sum() * found.width < 2e-3
    for side in (found.before, found.after):
        assert sum(side) * found.width == pytest.approx(1, abs=1e-4)
    # What rounds to a level is spread over the middles to its neighbours, and nothing beyond.
    levels = levels_of(spec).numpy()
    edges = (levels[1:] + levels[:-1]) / 2
    borders = np.array([2 * levels[0] - edges[0], *edges, 2 * levels[-1] - edges[-1]])
    nearest = np.abs(after.numpy()[:, None] - levels[None]).argmin(1)
    share = np.bincount(nearest, minlength=len(levels)) / after.numel()
    below = np.interp(sides, borders, np.concatenate([[0], share.cumsum()]))
    assert np.array(found.after) == pytest.approx(np.diff(below) / found.width, abs=2e-6)
    assert (found.count, found.least) == (len(levels), levels[0])
    assert found.levels == (tuple(levels) if len(levels) <= DRAWN else ())


def test_values_in_steps_are_the_codes():
    x = torch.randn(6, 70)  # a short last group
    for name in ("w4a16-g32-asym", "w8a16", "w3a16-g32"):
        spec, (before, after), _ = of(name, x)
        qparams = choose_qparams(x, spec)
        codes = quantize(x, qparams, spec).codes.flatten()
        assert after.round().equal(codes.float())
        assert (before - codes).abs().max() <= 0.5 + 1e-4


def test_what_is_clipped_is_seen_beyond_the_grid():
    levels = torch.arange(-7.0, 8.0, dtype=torch.float64)
    before = torch.tensor([-9.0, 0.0, 8.25, 1e6])
    found = distribution("w", "it", before, before.clamp(-7, 7), levels)
    end = found.first + found.width * len(found.before)
    assert end == 7.5 + BEYOND * found.width
    assert found.before[-1] * found.width == 0.25
    assert sum(found.after) * found.width == pytest.approx(1, abs=1e-5)


def test_counts_weigh_values():
    levels = torch.arange(0.0, 256.0, dtype=torch.float64)
    values, counts = torch.tensor([3.2, 100.7]), torch.tensor([1.0, 3.0])
    found = distribution("a", "it", values, values.round(), levels, counts)
    repeated = torch.tensor([3.2, 100.7, 100.7, 100.7])
    assert found == distribution("a", "it", repeated, repeated.round(), levels)


def test_the_least_exact_come_first():
    values = [5.0, None, 3.0, *map(float, range(10, 30))]
    assert least_exact(values) == [2, 0, 3, 4, 5, 6]
    assert len(least_exact(values)) == SHOWN
    assert least_exact([None]) == []
