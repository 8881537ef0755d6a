"""Separable kernels against what they must be: exact at full rank, optimal, and optimal on data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkit.algorithms.separable import MOST_UNKNOWNS, separable, separable_spectrum


def merged(depthwise: Tensor, pointwise: Tensor, inputs: int) -> Tensor:
    """A slow loop: each output's kernel of each input is a sum of that input's kernels."""
    out = torch.zeros(len(pointwise), inputs, *depthwise.shape[2:], dtype=torch.float64)
    rank = len(depthwise) // inputs
    for o in range(len(pointwise)):
        for i in range(inputs):
            for j in range(i * rank, (i + 1) * rank):
                out[o, i] += pointwise[o, j].double() * depthwise[j, 0].double()
    return out


def test_full_rank_is_exact() -> None:
    for shape in ((6, 4, 3, 3), (20, 3, 5), (12, 2, 2, 2, 2)):
        weight = torch.randn(shape)
        full = len(separable_spectrum(weight).energy)
        got = merged(*separable(weight, full), shape[1])
        torch.testing.assert_close(got, weight.double(), rtol=1e-5, atol=1e-6)


def test_what_is_separable_is_found() -> None:
    p, d = torch.randn(8, 5), torch.randn(5, 3, 3)
    weight = p[:, :, None, None] * d[None]
    depthwise, pointwise = separable(weight, 1)
    assert depthwise.shape == (5, 1, 3, 3)
    assert pointwise.shape == (8, 5)
    torch.testing.assert_close(merged(depthwise, pointwise, 5).float(), weight)
    assert separable_spectrum(weight).kept(1) == pytest.approx(1.0)


def test_the_error_is_what_the_spectrum_says() -> None:
    weight = torch.randn(16, 6, 3, 3)
    found = separable_spectrum(weight)
    for rank in (1, 2, 5):
        lost = (merged(*separable(weight, rank), 6) - weight.double()).square().sum()
        share = float(lost / weight.double().square().sum())
        assert share == pytest.approx(1 - found.kept(rank), rel=1e-4)


def excess(weight: Tensor, got: Tensor, moment: Tensor) -> float:
    """``E |W x - W' x|^2``."""
    off = (weight.double() - got).flatten(1)
    return float((off @ moment @ off.T).trace())


def test_on_data_it_is_nearer_and_stationary() -> None:
    """No small change of either factor makes the output's error smaller."""
    weight, patches = torch.randn(10, 4, 3, 3), torch.randn(400, 36) @ torch.randn(36, 36)
    moment = (patches.T @ patches / len(patches)).double()
    blind = excess(weight, merged(*separable(weight, 1), 4), moment)
    depthwise, pointwise = separable(weight.double(), 1, moment)
    best = excess(weight, merged(depthwise, pointwise, 4), moment)
    assert best < 0.8 * blind
    for _ in range(20):
        moved = pointwise + 1e-2 * torch.randn_like(pointwise)
        # The last solve was for the depthwise part, which leaves a little here.
        assert excess(weight, merged(depthwise, moved, 4), moment) > best * (1 - 1e-3)
    for _ in range(20):
        moved = depthwise + 1e-2 * torch.randn_like(depthwise)
        assert excess(weight, merged(moved, pointwise, 4), moment) > best * (1 - 1e-6)


def test_large_layers_fit_their_pointwise_part() -> None:
    inputs = MOST_UNKNOWNS // 9 + 1
    weight = torch.randn(4, inputs, 3, 3)
    scales = torch.rand(inputs * 9) + 0.1
    moment = torch.diag(scales.double())
    blind = excess(weight, merged(*separable(weight, 1), inputs), moment)
    assert excess(weight, merged(*separable(weight, 1, moment), inputs), moment) < blind


def test_channels_that_are_never_on_do_not_matter() -> None:
    weight, moment = torch.randn(6, 3, 3, 3), torch.zeros(27, 27)
    depthwise, pointwise = separable(weight, 2, moment)
    assert torch.isfinite(depthwise).all()
    assert torch.isfinite(pointwise).all()
