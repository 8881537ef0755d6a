"""Ranks under a budget: which directions of which layers to keep for so many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qkit.algorithms.low_rank import Spectrum


@dataclass(frozen=True)
class Costs:
    """A layer's parameters whole, and those of each rank of its factors."""

    whole: int
    each: int

    @property
    def worth(self) -> int:
        """The greatest rank that is smaller than the whole layer; 0 where none is."""
        return (self.whole - 1) // self.each

    def of(self, rank: int | None) -> int:
        """The parameters at this rank; None stands for the layer as it is."""
        return self.whole if rank is None else rank * self.each


def allocate(
    spectra: Mapping[str, Spectrum],
    costs: Mapping[str, Costs],
    budget: int,
    weights: Mapping[str, float] | None = None,
) -> dict[str, int | None]:
    """The rank of each layer, at least 1, or None for one that is left whole.

    Kept are the directions that bring most for their parameters: the share of its layer's energy,
    times the layer's weight (how much the model's output depends on it), over the cost of a rank.
    Each layer's directions descend, so that taking the best first is optimal for a total of
    ``budget`` parameters, up to the last one. A layer that would keep all that it has stays whole.
    """
    whole: set[str] = {name for name, cost in costs.items() if cost.worth < 1}
    while True:
        ranks = _greedy(spectra, costs, budget, weights or {}, whole)
        full = {n for n, rank in ranks.items() if rank is not None and rank > costs[n].worth}
        if not full:
            return ranks
        whole |= full


def _greedy(
    spectra: Mapping[str, Spectrum],
    costs: Mapping[str, Costs],
    budget: int,
    weights: Mapping[str, float],
    whole: set[str],
) -> dict[str, int | None]:
    names = [name for name in spectra if name not in whole]
    ranks: dict[str, int | None] = {name: None if name in whole else 1 for name in spectra}
    left = budget - sum(costs[name].of(rank) for name, rank in ranks.items())
    if not names:
        return ranks
    gains, owners, prices = [], [], []
    for index, name in enumerate(names):
        energy = spectra[name].energy
        share = energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
        gains.append(share[1:] * weights.get(name, 1.0) / costs[name].each)
        owners.append(torch.full((len(energy) - 1,), index))
        prices.append(torch.full((len(energy) - 1,), costs[name].each))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    spent = torch.cat(prices)[order].cumsum(0)
    taken = torch.cat(owners)[order][spent <= left]
    for index, name in enumerate(names):
        ranks[name] = 1 + int((taken == index).sum())
    return ranks
