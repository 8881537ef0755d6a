"""How layers are factorized: what is asked for, the ranks that follow, the factors themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qkit.algorithms.low_rank import Spectrum, cp, pair, tucker, unfolding_spectra
from qkit.algorithms.ranks import Costs, allocate
from qkit.algorithms.separable import separable, separable_spectrum
from qkit.errors import UsageError
from qkit.flows.evaluate import eval_mode
from qkit.models import Inputs, run
from qkit.nn.factorized import CONVOLUTIONS, Factorized, cost, factorize_layer
from qkit.report import compare

CONVOLUTION_KINDS = ("channel", "spatial", "tucker", "cp", "separable", "none")
# Whose factors keep what data excite, where there are some.
LEARNING_KINDS = ("svd", "channel", "separable")


@dataclass(frozen=True)
class Wanted:
    """How far to go: one of ``amount`` (share of the parameters to remove, of each layer or, by
    ``sensitivity``, of all, where the output depends least on them), ``energy`` (share of each
    layer's energy to keep) and ``rank``. ``conv`` is the kind of a convolution's factors."""

    amount: float | None = None
    energy: float | None = None
    rank: int | None = None
    sensitivity: bool = False
    conv: str = "channel"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("amount", "energy", "rank") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError("give one of amount, energy and rank", got=" and ".join(given))
        if not given:
            object.__setattr__(self, "amount", 0.5)
        if self.amount is not None and not 0 < self.amount < 1:
            raise UsageError(
                "the amount is the share of parameters to remove",
                got=self.amount,
                wanted="more than 0, less than 1",
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError("the energy is the share to keep", got=self.energy, wanted="0 to 1")
        if self.rank is not None and self.rank < 1:
            raise UsageError("a rank is at least 1", got=self.rank)
        if self.sensitivity and self.amount is None:
            raise UsageError("the sensitivity of layers shares out an amount", got=given[0])
        if self.conv not in CONVOLUTION_KINDS:
            raise UsageError(
                "unknown factors of a convolution",
                got=repr(self.conv),
                wanted=", ".join(CONVOLUTION_KINDS),
            )

    def kind_of(self, module: nn.Module) -> str:
        """The kind of factors that ``module`` would have."""
        return self.conv if isinstance(module, CONVOLUTIONS) else "svd"

    def to_json(self) -> dict[str, Any]:
        """One step of a recipe."""
        return {"factorize": asdict(self) | {"ignore": list(self.ignore)}}

    def __str__(self) -> str:
        if self.amount is not None:
            return f"{self.amount:g} of the parameters removed"
        return f"rank {self.rank}" if self.rank else f"energy {self.energy:g} kept"


def is_matrix(wanted: Wanted, layer: nn.Module) -> bool:
    """Whether the factors come from one matrix, which has a spectrum."""
    return wanted.kind_of(layer) in ("svd", "channel", "spatial")


def matrix_of(wanted: Wanted, layer: Any) -> Tensor:
    """The weight as the matrix whose rank is reduced."""
    weight: Tensor = layer.weight.detach()
    if wanted.kind_of(layer) == "spatial":  # [out * kw, in * kh]
        return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return weight.flatten(1)


Ranks = dict[str, tuple[int, ...] | None]


def choose_ranks(
    model: nn.Module,
    layers: Mapping[str, Any],
    wanted: Wanted,
    spectra: Mapping[str, Spectrum],
    inputs: Inputs | None,
) -> Ranks:
    """The ranks of each layer; None for one that stays because its factors would be no smaller."""
    kinds = {name: wanted.kind_of(layer) for name, layer in layers.items()}
    costs = {
        name: Costs(layer.weight.numel(), cost(layer, kinds[name], (1,)))
        for name, layer in layers.items()
        if name in spectra
    }
    found: Ranks = {}
    if wanted.sensitivity:
        weights = _sensitivity(model, layers, wanted, spectra, costs, inputs)
        budget = round((1 - (wanted.amount or 0)) * sum(each.whole for each in costs.values()))
        ranks = allocate(spectra, costs, budget, weights)
        found |= {name: None if r is None else (r,) for name, r in ranks.items()}
    for name, layer in layers.items():
        if name in found:
            continue
        if name not in spectra:
            ranks_ = _tensor_ranks(layer, wanted)
        elif wanted.amount is not None:
            share = (1 - wanted.amount) * costs[name].whole
            ranks_ = (max(1, int(share / costs[name].each)),)
        else:
            full = len(spectra[name].energy)
            ranks_ = (min(wanted.rank or spectra[name].rank_of(wanted.energy or 1.0), full),)
        smaller = cost(layer, kinds[name], ranks_) < layer.weight.numel()
        found[name] = ranks_ if smaller else None
    return {name: found[name] for name in layers}


def _tensor_ranks(layer: Any, wanted: Wanted) -> tuple[int, ...]:
    """The ranks of factors that are not one matrix's: the largest within the layer's own budget."""
    kind, weight = wanted.kind_of(layer), layer.weight.detach()
    if kind == "separable":
        found = separable_spectrum(weight)
        budget = (1 - (wanted.amount or 0)) * weight.numel()
        rank = wanted.rank or max(1, int(budget / cost(layer, kind, (1,))))
        rank = rank if wanted.energy is None else found.rank_of(wanted.energy)
        return (min(rank, len(found.energy)),)
    spectra = unfolding_spectra(weight)
    full = tuple(len(found.energy) for found in spectra)
    if kind == "cp":
        if wanted.energy is not None:
            raise UsageError("CP has no energy by rank", fix="amount or rank, or another kind")
        budget = (1 - (wanted.amount or 0)) * weight.numel()
        return (wanted.rank or max(1, int(budget / cost(layer, kind, (1,)))),)
    if wanted.rank is not None:
        return _possible(layer, (wanted.rank, wanted.rank))
    if wanted.energy is not None:
        return _possible(layer, tuple(found.rank_of(wanted.energy) for found in spectra))
    assert wanted.amount is not None
    # Both ranks the same share of their full ones.
    most = max(full)
    found_ranks = [
        _possible(layer, tuple(max(1, n * i // most) for n in full)) for i in range(most, 0, -1)
    ]
    budget = (1 - wanted.amount) * weight.numel()
    return next((r for r in found_ranks if cost(layer, kind, r) <= budget), found_ranks[-1])


def _possible(layer: Any, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks of a Tucker decomposition: the core has no more rows than columns, either way."""
    area = math.prod(layer.kernel_size)
    out_rank, in_rank = min(ranks[0], layer.out_channels), min(ranks[1], layer.in_channels)
    return min(out_rank, in_rank * area), min(in_rank, out_rank * area)


def _sensitivity(
    model: nn.Module,
    layers: Mapping[str, Any],
    wanted: Wanted,
    spectra: Mapping[str, Spectrum],
    costs: Mapping[str, Costs],
    inputs: Inputs | None,
) -> dict[str, float]:
    """How much the output's error is per lost share of each layer's energy, measured one by one."""
    if not wanted.sensitivity:
        return {}
    assert inputs is not None
    assert wanted.amount is not None
    weights = {}
    with eval_mode(model):
        reference = run(model, inputs)
        for name, found in spectra.items():
            rank = max(1, round((1 - wanted.amount) * costs[name].whole / costs[name].each))
            lost = 1 - found.kept(rank)
            if rank >= len(found.energy) or lost <= 0:
                weights[name] = 0.0
                continue
            kept = layers[name].weight.data
            low = factors_of(layers[name], wanted, (rank,), found)
            layers[name].weight.data = low.weight.detach().contiguous()
            try:
                error = compare(reference, run(model, inputs))
            finally:
                layers[name].weight.data = kept
            noise = 0.0 if error.sqnr_db is None else 10 ** (-error.sqnr_db / 10)
            weights[name] = noise / lost
    return weights


def factors_of(
    layer: Any,
    wanted: Wanted,
    ranks: tuple[int, ...],
    found: Spectrum | None,
    moment: Tensor | None = None,
) -> Factorized:
    """``layer`` as factors of ``ranks``; ``found`` is the spectrum of its matrix, if it is one,
    ``moment`` that of its inputs, where they are known."""
    kind, weight = wanted.kind_of(layer), layer.weight.detach()
    if found is not None:
        first, last = pair(matrix_of(wanted, layer), found, ranks[0])
        if kind == "spatial":  # [out * kw, r] -> [out, r, 1, kw]
            last = last.unflatten(0, (weight.shape[0], -1)).transpose(1, 2)
        return factorize_layer(layer, kind, (first, last), ranks)
    if kind == "separable":
        return factorize_layer(layer, kind, separable(weight, ranks[0], moment), ranks)
    if kind == "tucker":
        return factorize_layer(layer, kind, tucker(weight, (ranks[0], ranks[1])), ranks)
    last, first, *middle = cp(weight, ranks[0])
    parts = [first.T, *(factor.T for factor in middle), last]
    return factorize_layer(layer, kind, parts, ranks)
