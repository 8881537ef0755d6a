"""What to remove: the least important units, until the model costs as little as was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qkit.errors import BudgetError, UsageError
from qkit.pruning.facts import Facts
from qkit.pruning.groups import Group, Removed, nothing
from qkit.pruning.importance import Scores

# oneDNN's convolutions go by blocks of 16 channels: with half of its multiply-adds, ResNet-18 took
# 1/1.75 of its processor time in multiples of 16, and 1/1.47 of it in multiples of 8.
ROUND_TO = 16
# A group of fewer units than this many blocks is rounded to smaller blocks.
BLOCKS = 4


@dataclass(frozen=True)
class Limits:
    """What a plan keeps to: at least ``keep`` units of each group, in blocks of ``round_to`` rows
    (fewer in small groups); ``per_layer``: the same share of every group, else all compete."""

    keep: int = 1
    round_to: int = ROUND_TO
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("round_to", self.round_to)):
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} is an integer, and at least 1", got=repr(value))


def check_amount(amount: float) -> None:
    """Raise :class:`~qkit.errors.UsageError` unless something is removed and something left."""
    if not 0 < amount < 1:
        raise UsageError("the amount is the share that is removed, above 0 and below 1", got=amount)


class Ranking:
    """All units of ``groups`` in the order in which they are removed."""

    def __init__(self, facts: Facts, groups: list[Group], scores: Scores, limits: Limits) -> None:
        self.facts, self.groups, self.limits = facts, groups, limits
        self._orders = [g.units[np.argsort(scores[g.units], kind="stable")] for g in groups]
        keys = []
        for group in groups:
            own = scores[group.units]
            if limits.per_layer:
                own = np.where(np.isinf(own), np.inf, np.argsort(np.argsort(own)) / len(own))
            keys.append(own)
        flat = np.concatenate(keys) if keys else np.zeros(0)
        owners = np.concatenate([np.full(len(k), i) for i, k in enumerate(keys)] or [np.zeros(0)])
        usable = np.isfinite(flat)
        order = np.argsort(flat[usable], kind="stable")
        self._owners = owners[usable][order].astype(np.int64)

    def __len__(self) -> int:
        return len(self._owners)

    def first(self, count: int) -> Removed:
        """What goes if ``count`` units should, after rounding and what must be kept."""
        table = nothing(self.facts)
        asked = np.bincount(self._owners[:count], minlength=len(self.groups))
        for group, order, drop in zip(self.groups, self._orders, asked, strict=True):
            kept = self._kept(group, len(order) - int(drop))
            table[order[: len(order) - kept]] = True
        return table

    def _kept(self, group: Group, wanted: int) -> int:
        """``wanted`` units, to the nearest block, at least one and what must be kept."""
        total = len(group.units)
        if wanted == total:
            return total
        block = self.limits.round_to // math.gcd(self.limits.round_to, group.width)
        while block > 1 and total < BLOCKS * block:
            block = (block + 1) // 2
        kept = max(block * math.floor(wanted / block + 0.5), block, self.limits.keep)
        return min(kept, total)


def reach(
    ranking: Ranking,
    wanted: float,
    cost: Callable[[Removed], float],
    *,
    what: str,
    steps: int | None = None,
) -> Removed:
    """The fewest units, in order, without which ``cost`` is at most ``wanted``.

    ``steps``: by how many sizes to go, where a ``cost`` is dear; every unit if None.

    Raises :class:`~qkit.errors.BudgetError` if not even all of them are enough.
    """
    most = len(ranking)
    if (least := cost(ranking.first(most))) > wanted:
        raise BudgetError(
            f"not enough can be removed: the rest of the {what} is in layers that must stay",
            got=f"{least:.6g} at the least",
            wanted=f"at most {wanted:.6g}",
            fix="a smaller --amount, fewer --ignore, a smaller --keep",
        )
    stride = 1 if steps is None else max(1, math.ceil(most / steps))
    low, high = 0, math.ceil(most / stride)
    while low < high:
        middle = (low + high) // 2
        if cost(ranking.first(middle * stride)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return ranking.first(min(high * stride, most))
