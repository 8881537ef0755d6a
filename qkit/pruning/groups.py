"""Units that can be removed, in groups of peers, and what a model costs without some of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from qkit.errors import UsageError
from qkit.pruning.facts import Facts, Slot, left
from qkit.pruning.labels import FROZEN, Ids
from qkit.spec import Rule

Removed = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that occur in the same tensors: the channels of one layer, or the heads.

    ``units`` are their labels, ``entries`` the axes that they are on, ``width`` how many rows of
    the first one each unit takes.
    """

    name: str
    units: Ids
    entries: tuple[tuple[Slot, int], ...]
    width: int


def groups_of(facts: Facts, model: nn.Module, ignore: Sequence[str] = ()) -> list[Group]:
    """The groups of ``model``, but for the outputs of modules that ``ignore`` names.

    Raises :class:`~qkit.errors.UsageError` for a name that matches no module.
    """
    made = np.unique(np.concatenate([np.zeros(1, np.int64), *(ids for _, ids in facts.made)]))
    held = _held(facts, model, ignore)
    where: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for key, slot in facts.slots.items():
        for axis, ids in enumerate(slot.axes):
            for label in np.intersect1d(ids, made):
                if label != FROZEN and label not in held:
                    where[int(label)].append((key, axis))
    peers: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for label, entries in where.items():
        peers[tuple(entries)].append(label)
    return [_group(facts, entries, labels) for entries, labels in peers.items() if len(labels) > 1]


def _group(facts: Facts, entries: tuple[tuple[int, int], ...], labels: list[int]) -> Group:
    found = [(facts.slots[key], axis) for key, axis in entries]
    slot, axis = next((e for e in found if e[0].tensor.dim() > 1 and e[1] == 0), found[0])
    width = int((slot.axes[axis] == labels[0]).sum())
    name = slot.names[0].rpartition(".")[0] or slot.names[0]
    return Group(name, np.array(labels), tuple(found), width)


def _held(facts: Facts, model: nn.Module, ignore: Sequence[str]) -> set[int]:
    rules = [Rule(pattern, None) for pattern in ignore]
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    for rule in rules:
        if not any(rule.matches(*each) for each in modules):
            raise UsageError("no layer is called so", got=rule.match)
    kinds, held = dict(modules), set[int]()
    for module, ids in facts.made:
        if any(rule.matches(module, kinds.get(module, "")) for rule in rules):
            held |= set(ids.tolist())
    return held


@dataclass(frozen=True)
class Size:
    """What a model costs: multiply-adds of the traced call, parameters, bytes of all tensors."""

    macs: int
    params: int
    bytes: int


def size(facts: Facts, removed: Removed | None = None) -> Size:
    """The cost of the traced model without the labels ``removed``."""
    gone = nothing(facts) if removed is None else removed
    macs = sum(
        cost.factor * math.prod(left(ids, gone) for ids in cost.axes) for cost in facts.costs
    )
    params = octets = 0
    for slot in facts.slots.values():
        count = math.prod(left(ids, gone) for ids in slot.axes)
        octets += count * slot.tensor.element_size()
        params += count if isinstance(slot.tensor, nn.Parameter) else 0
    return Size(macs, params, octets)


def nothing(facts: Facts) -> Removed:
    """A table by label in which nothing is removed."""
    return np.zeros(facts.labels.count, np.bool_)


def removal(facts: Facts, labels: Iterable[int]) -> Removed:
    """The table by label in which ``labels`` are removed."""
    table = nothing(facts)
    table[np.fromiter(labels, np.int64)] = True
    return table
