"""Factors between two layers: the formulas, and what has no factor."""

from __future__ import annotations

import torch

from qkit.algorithms.equalization import LIMIT, below, cross_layer, smooth


def test_both_weights_get_one_range() -> None:
    made, read = torch.rand(17) * 100 + 0.1, torch.rand(17) + 0.1
    factor = cross_layer(made, read)
    assert torch.allclose(made / factor, read * factor)
    assert torch.allclose(made / factor, (made.double() * read).sqrt())


def test_alpha_shares_the_difficulty() -> None:
    activation, weight = torch.rand(13) * 50 + 0.1, torch.rand(13) + 0.1
    half = smooth(activation, weight)
    assert torch.allclose(activation / half, weight * half)
    assert torch.allclose(activation / smooth(activation, weight, 1.0), torch.ones(13).double())
    assert torch.allclose(weight * smooth(activation, weight, 0.0), torch.ones(13).double())


def test_channels_without_values_keep_theirs() -> None:
    nothing, something = torch.tensor([0.0, 0.0, 1.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert cross_layer(nothing, something).tolist() == [1, 1, 1, 2]
    assert smooth(nothing, something).tolist() == [1, 1, 1, 2]
    assert float(cross_layer(torch.tensor([1e30]), torch.tensor([1e-8]))) == LIMIT


def test_no_channel_comes_to_a_ceiling() -> None:
    seen, factor = torch.tensor([1.5, 3.0, 6.0]), torch.tensor([0.1, 2.0, 3.0]).double()
    found = below(factor, seen, 6.0)
    assert found.tolist() == [0.25, 2.0, 1.0]
    assert (seen / found <= 6).all()
