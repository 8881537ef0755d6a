"""Weights fitted to rounded inputs: against numpy's own least squares, and on new data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkit.algorithms import Joint, least_squares


def summed(x: Tensor, y: Tensor, pieces: int = 3) -> Joint:
    """The sums of ``x`` ``[groups, n, in]`` and ``y``, piece by piece."""
    first, *others = zip(x.chunk(pieces, 1), y.chunk(pieces, 1), strict=True)
    total = Joint.of(*first)
    for a, b in others:
        total = total + Joint.of(a, b, total.at)
    return total


def halves_of(x: Tensor, y: Tensor) -> tuple[Joint, Joint]:
    """Every other vector in one of two sums."""
    first = Joint.of(x[:, ::2], y[:, ::2])
    return first, Joint.of(x[:, 1::2], y[:, 1::2], first.at)


def data(rows: int = 600, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of few directions far from zero, a weight, and outputs."""
    few = torch.randn(groups, rows, 3).double()
    x = few @ torch.randn(groups, 3, 8).double() + 0.1 * torch.randn(groups, rows, 8) + 50
    weight = torch.randn(groups * 4, 8).double()
    return x, weight, x @ weight.reshape(groups, 4, 8).transpose(1, 2) + 3


def test_sums_tell_moments_and_errors():
    x, weight, y = data()
    joint = summed(x, y + torch.randn_like(y))
    y = y + 0
    xx, yx, yy = summed(x, y).covariance
    for g in range(2):
        both = np.cov(np.concatenate([x[g].numpy(), y[g].numpy()], 1), rowvar=False, bias=True)
        np.testing.assert_allclose(xx[g], both[:8, :8], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(yx[g], both[8:, :8], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(yy[g], both.diagonal()[8:], rtol=1e-9, atol=1e-9)
    # An error of noise of size 1; of the exact outputs none.
    error = joint.error(weight.reshape(2, 4, 8))
    assert torch.allclose(error, torch.ones(2, 4).double(), atol=0.25)
    assert float(summed(x, y).error(weight.reshape(2, 4, 8)).abs().max()) < 1e-8


def test_exact_inputs_keep_the_weight():
    x, weight, y = data()
    torch.testing.assert_close(least_squares(weight, halves_of(x, y)), weight, rtol=1e-6, atol=1e-6)


def test_noise_is_filtered_as_numpy_says():
    x, weight, y = data(4000, groups=1)
    rounded = (x / 0.7).round() * 0.7
    halves = halves_of(rounded, y)
    fitted = least_squares(weight, halves)
    ones = np.concatenate([rounded[0].numpy(), np.ones((4000, 1))], 1)
    best, *_ = np.linalg.lstsq(ones, y[0].numpy(), rcond=None)
    both = halves[0] + halves[1]

    def error(w: Tensor) -> float:
        return float(both.error(w[None].double()).sum())

    least = error(torch.from_numpy(best[:8].T))
    assert least <= error(fitted) < 1.01 * least
    assert error(fitted) < 0.7 * error(weight)


@pytest.mark.parametrize("rows", [6, 40, 120])
def test_scarce_data_are_not_believed(rows):
    """Fewer samples than columns, or few more: what is learnt does not lose on others; of too
    few, nothing is learnt."""
    x, weight, y = data(2000, groups=1)
    rounded = (x / 0.3).round() * 0.3
    fitted = least_squares(weight, halves_of(rounded[:, :rows], y[:, :rows]))
    others = summed(rounded[:, 1000:], y[:, 1000:])
    before, after = (others.error(w[None]).sum() for w in (weight, fitted))
    assert after < 1.1 * before
    assert torch.equal(fitted, weight) == (rows < 80)


def test_inputs_that_never_change():
    x, weight, y = data(100)
    fitted = least_squares(weight, halves_of(x[:, :1].expand_as(x), y))
    assert fitted.isfinite().all()
    torch.testing.assert_close(fitted, weight)
