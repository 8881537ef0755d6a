"""What tracing a model finds out: its tensors, what it computes, and what its code counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from qkit.pruning.labels import FROZEN, Ids, Labels, Layout


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter or buffer under all its ``names``, and the labels along each axis."""

    tensor: Tensor
    names: list[str]
    axes: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Cost:
    """The multiply-adds of one operation: ``factor`` times what is left along each of ``axes``."""

    module: str
    factor: int
    axes: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Count:
    """An attribute of a module that is the number of coordinates along ``dim`` of ``ids``.

    ``index`` is the place in an attribute that is a tuple.
    """

    module: str
    attribute: str
    ids: Ids
    dim: int = 0
    index: int | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A size that a view, split or slice mentions, in the code of the innermost of ``modules``.

    ``place`` tells where in the code: a line, and the axis.
    """

    modules: tuple[str, ...]
    place: str
    size: int
    ids: Ids
    dim: int


@dataclass(eq=False)
class Facts:
    """All that is known of a traced model.

    ``made`` are the labels of what the weights of a module put out: only these can be removed.
    ``stops`` counts the operations through which labels are not followed, and ``through_norms``
    says whether channels are removed that a normalisation or a mean goes over.
    """

    through_norms: bool = False
    labels: Labels = field(default_factory=Labels)
    slots: dict[int, Slot] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    made: list[tuple[str, Ids]] = field(default_factory=list)
    stops: Counter[str] = field(default_factory=Counter)

    def slot(self, tensor: Tensor, name: str) -> Slot:
        """The slot of ``tensor``, which is called ``name`` here too."""
        found = self.slots.get(id(tensor))
        if found is None:
            axes = tuple(self.labels.fresh(size) for size in tensor.shape)
            found = self.slots[id(tensor)] = Slot(tensor, [], axes)
        if name not in found.names:
            found.names.append(name)
        return found

    def add_model(self, model: nn.Module) -> None:
        """Take every parameter and buffer of ``model``, at each of its names."""
        for prefix, module in model.named_modules(remove_duplicate=False):
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self.slot(tensor, f"{prefix}.{leaf}" if prefix else leaf)

    def make(self, module: str, ids: Ids) -> None:
        """The weights of ``module`` put out ``ids``."""
        self.made.append((module, ids))

    def mention(self, modules: tuple[str, ...], line: str, *layouts: Layout) -> None:
        """The code of ``modules`` may say the sizes of ``layouts`` by attributes, in ``line``."""
        for part, layout in enumerate(layouts):
            known = {
                axis: (ids, dim) for axes, ids in layout.factors for dim, axis in enumerate(axes)
            }
            for axis, size in enumerate(layout.shape):
                ids, dim = known.get(axis, (np.full(size, FROZEN, np.int64), 0))
                self.sites.append(Site(modules, f"{line} {part} {axis}", size, ids, dim))

    def reduced(self, layout: Layout, *axes: int) -> None:
        """``axes`` are averaged over: what is left would be averaged otherwise."""
        if not self.through_norms:
            layout.freeze(*axes)

    def close(self) -> None:
        """Once everything is traced: every label is the one of its unit."""
        self.labels.close()
        find = self.labels.find
        self.slots = {
            key: replace(slot, axes=tuple(find(ids) for ids in slot.axes))
            for key, slot in self.slots.items()
        }
        self.costs = [replace(cost, axes=tuple(map(find, cost.axes))) for cost in self.costs]
        self.counts = [replace(count, ids=find(count.ids)) for count in self.counts]
        self.sites = [replace(site, ids=find(site.ids)) for site in self.sites]
        self.made = [(module, find(ids)) for module, ids in self.made]


def left(ids: Ids, removed: np.ndarray, dim: int = 0) -> int:
    """How many coordinates along ``dim`` of ``ids`` are left; ``removed`` is a table by label."""
    kept = ~removed[ids]
    return int(kept.any(tuple(d for d in range(ids.ndim) if d != dim)).sum())
