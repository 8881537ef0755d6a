"""Zeroing single weights: how much each matters, which stay, and what makes up for the rest.

==============  =======================================================================
``magnitude``   ``|w|``
``wanda``       ``|w| sqrt(E[x^2])`` of the input that it multiplies (Sun et al. 2023)
``snip``        ``|w sum_b g_b|`` over batches (Lee et al. 2019)
``taylor``      ``sum_b (w g_b)^2`` over batches (Molchanov et al. 2019)
``movement``    ``-sum_t w_t g_t`` over the steps of a training (Sanh et al. 2020)
``sparsegpt``   ``w^2 / [H^-1]_ii``, and later columns make up for each zero
                (Frantar and Alistarh 2023, arXiv 2301.00774)
==============  =======================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.algorithms.compensate import BLOCK, compensate, inverse_factor
from qkit.algorithms.stats import Stats
from qkit.errors import UsageError

SCOPES = ("row", "layer", "global")


@dataclass(frozen=True)
class Sparsity:
    """How much is zeroed: the share ``amount`` of each row, layer or the model (``scope``), or,
    as ``2:4`` says, all but ``n`` of each ``m`` neighbours along the input."""

    amount: float
    scope: str = "layer"
    n: int = 0
    m: int = 0

    @staticmethod
    def parse(amount: float | str, scope: str) -> Sparsity:
        """``0.5`` or ``"2:4"``; :class:`~qkit.errors.UsageError` for what leaves or takes all."""
        if scope not in SCOPES:
            raise UsageError("unknown scope", got=repr(scope), wanted=", ".join(SCOPES))
        if isinstance(amount, str):
            match = re.fullmatch(r"(\d+):(\d+)", amount)
            n, m = (int(match[1]), int(match[2])) if match else (0, 0)
            if not (0 < n < m and BLOCK % m == 0):
                raise UsageError(
                    "not a pattern of sparsity", got=repr(amount), wanted="N:M, such as 2:4 or 4:8"
                )
            return Sparsity(1 - n / m, "row", n, m)
        if not 0 < amount < 1:
            raise UsageError("the amount is the share that is zeroed, above 0 and below 1",
                             got=amount)  # fmt: skip
        return Sparsity(float(amount), scope)

    def left(self, count: int) -> int:
        """How many of ``count`` values that compete stay."""
        return count - round(self.amount * count)


def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """The scores of ``weight`` ``[rows, columns]`` under the inputs of ``stats``."""
    norms = stats.moment.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    rows = weight.shape[0] // len(norms)
    return weight.abs().float() * norms.repeat_interleave(rows, 0)


def kept(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Which of ``scores`` ``[rows, columns]`` stay: the greatest; of equal ones, the first."""
    if sparsity.m:
        columns = scores.shape[1]
        short = -columns % sparsity.m  # the last group may be short, and then keeps the more
        padded = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        groups = padded.reshape(-1, sparsity.m)
        return _greatest(groups, sparsity.n).reshape(padded.shape)[:, :columns]
    flat = scores if sparsity.scope == "row" else scores.reshape(1, -1)
    return _greatest(flat, sparsity.left(flat.shape[1])).reshape(scores.shape)


def _greatest(rows: Tensor, count: int) -> Tensor:
    order = rows.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def sparsegpt(weight: Tensor, sparsity: Sparsity, stats: Stats) -> Tensor:
    """``weight`` ``[rows, columns]`` with zeros, and other values in the places that stay.

    Masks are chosen for :data:`BLOCK` columns at a time (or ``m``), after what came before has been
    compensated. ``stats.moment`` is ``[groups, columns, columns]``.
    """
    parts = zip(weight.float().chunk(len(stats.moment)), stats.moment, strict=True)
    return torch.cat([_pruned(part.clone(), sparsity, moment) for part, moment in parts])


def _pruned(weight: Tensor, sparsity: Sparsity, moment: Tensor) -> Tensor:
    factor = inverse_factor(moment)
    width = sparsity.m or BLOCK
    result, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)

    def replace(at: int, column: Tensor) -> Tensor:
        if at % width == 0:
            part = slice(at, min(at + width, weight.shape[1]))
            scores = (weight[:, part] / factor.diagonal()[part]).square()
            mask[:, part] = kept(scores, sparsity)
        result[:, at] = column * mask[:, at]
        return result[:, at]

    compensate(weight, factor, replace)
    return result
