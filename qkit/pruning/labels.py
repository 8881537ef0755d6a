"""Labels: which coordinates of which tensors can only be removed together.

Every coordinate along every axis of a parameter has a label. An operation that makes two
coordinates stand or fall together joins their labels; what is left is a partition of all
coordinates into units. The label :data:`FROZEN` marks what cannot be removed (a pixel, a class).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Factor = tuple[tuple[int, ...], Ids]

FROZEN = 0


class Labels:
    """Sets of labels under union (a union-find forest, whose roots are the smallest labels)."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1, np.int64)
        self.rectangles: list[Ids] = []

    @property
    def count(self) -> int:
        """How many labels there are."""
        return len(self._parent)

    def fresh(self, count: int) -> Ids:
        """``count`` new labels. A single one is frozen: an axis cannot become empty."""
        if count < 2:
            return np.full(count, FROZEN, np.int64)
        ids = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def find(self, ids: Ids) -> Ids:
        """The label that stands for the set of each of ``ids``."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[ids] = roots
                return roots
            roots = above

    def join(self, a: Ids, b: Ids) -> None:
        """Unite the sets of ``a`` and ``b``, element by element (broadcast)."""
        a, b = (each.ravel() for each in np.broadcast_arrays(a, b))
        while True:
            a, b = self.find(a), self.find(b)
            low, high = np.minimum(a, b), np.maximum(a, b)
            if not (differ := low != high).any():
                return
            np.minimum.at(self._parent, high[differ], low[differ])

    def freeze(self, ids: Ids) -> None:
        """Say that ``ids`` cannot be removed."""
        self.join(ids, np.array(FROZEN))

    def settle(self, ids: Ids) -> None:
        """Let the first dimension of ``ids`` alone tell the label: whole heads, say."""
        self.join(ids, ids[(slice(None),) + (slice(1),) * (ids.ndim - 1)])

    def close(self) -> None:
        """Make every split axis rectangular: what is removed of ``[a, b]`` are rows or columns.

        Where nothing has asked for one of the two, the finer one is taken.
        """
        for ids in self.rectangles:
            ids = self.find(ids)
            if sum(not _constant(ids, dim) for dim in range(ids.ndim)) > 1:
                longest = int(np.argmax(ids.shape))
                self.settle(np.moveaxis(ids, longest, 0))
        self.rectangles.clear()


def _constant(ids: Ids, dim: int) -> bool:
    return bool((ids == ids.take([0], dim)).all())


@dataclass(frozen=True, eq=False)
class Layout:
    """The labels of a tensor of ``shape``.

    A factor ``(axes, ids)`` holds the labels of one axis, or of several jointly (an axis that a
    view has split: the label depends on the pair), the outermost of the split first. Axes without
    a factor are frozen. ``blank`` is where code made the tensor of sizes alone, such as zeros: its
    modules, the innermost first, and the line.
    """

    labels: Labels
    shape: tuple[int, ...]
    given: tuple[Factor, ...] = ()
    blank: tuple[tuple[str, ...], str] | None = None

    @staticmethod
    def of(labels: Labels, shape: Iterable[int], axes: Mapping[int, Ids]) -> Layout:
        """Separate axes."""
        return Layout(labels, tuple(shape), tuple(((axis,), ids) for axis, ids in axes.items()))

    @property
    def factors(self) -> list[Factor]:
        """The factors as they are now: dimensions on which nothing depends are left out."""
        found = (self._simple(*factor) for factor in self.given)
        return [factor for factor in found if factor is not None]

    def _simple(self, axes: tuple[int, ...], ids: Ids) -> Factor | None:
        ids = self.labels.find(ids)
        if not ids.any():
            return None
        for dim in reversed(range(ids.ndim)):
            if _constant(ids, dim):
                ids, axes = np.asarray(ids.take(0, dim)), axes[:dim] + axes[dim + 1 :]
        if not axes:  # one unit that is all of an axis
            self.labels.freeze(ids)
            return None
        return axes, ids

    def ids(self, axis: int) -> Ids:
        """The labels along ``axis`` alone; a split axis is settled on its outermost part."""
        axis %= len(self.shape)
        for axes, ids in self.factors:
            if axis in axes:
                self.labels.settle(ids)
                return self.labels.find(_first(ids)) if axes[0] == axis else self._none(axis)
        return self._none(axis)

    def _none(self, axis: int) -> Ids:
        return np.full(self.shape[axis], FROZEN, np.int64)

    def freeze(self, *axes: int) -> None:
        """Say that nothing can be removed along ``axes`` (none given: all)."""
        if not axes:
            for _, ids in self.factors:
                self.labels.freeze(ids)
        for axis in axes:
            self.labels.freeze(self.ids(axis))

    def moved(self, shape: Iterable[int], where: Mapping[int, int]) -> Layout:
        """A tensor of ``shape`` whose axis ``where[k]`` is the axis ``k`` of this one.

        Axes that are not in ``where`` are gone, or are told apart from what the others depend on.
        """
        for axis in set(range(len(self.shape))) - where.keys():
            self.ids(axis)  # settles it
        factors = [
            (tuple(where[axis] for axis in axes), ids)
            for axes, ids in self.factors
            if all(axis in where for axis in axes)
        ]
        return Layout(self.labels, tuple(shape), tuple(factors))

    def reshaped(self, shape: Iterable[int]) -> Layout:
        """The same values in another ``shape``, row by row."""
        shape = tuple(shape)
        blocks = _blocks(self, _runs(self.shape, shape))
        factors: list[Factor] = []
        for old, new in blocks:
            inside = [(axes, ids) for axes, ids in self.factors if axes[0] in old]
            # The finest stays; a coordinate that goes with either of two cannot be told.
            inside.sort(key=lambda factor: len(np.unique(factor[1])), reverse=True)
            for _, ids in inside[1:]:
                self.labels.freeze(ids)
            if inside:
                axes, ids = inside[0]
                ids = _spread(axes, ids, old, self.shape)
                ids = ids.reshape([shape[axis] for axis in new])
                if (factor := self._simple(new, ids)) is not None:
                    factors.append(factor)
                    if len(factor[0]) > 1:
                        self.labels.rectangles.append(factor[1])
        return Layout(self.labels, shape, tuple(factors))


def _first(ids: Ids) -> Ids:
    first: Ids = ids[(slice(None),) + (0,) * (ids.ndim - 1)]
    return first


def _spread(axes: tuple[int, ...], ids: Ids, wide: list[int], shape: tuple[int, ...]) -> Ids:
    """The ``ids`` of ``axes``, repeated along the rest of the axes ``wide``."""
    order = np.argsort(axes)
    ids = ids.transpose(order)
    ids = ids.reshape([shape[axis] if axis in axes else 1 for axis in wide])
    return np.broadcast_to(ids, [shape[axis] for axis in wide])


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes with equal products; axes of size 1 are in none."""
    if 0 in old or 0 in new:
        return []
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        m, n = old[a[0]], new[b[0]]
        while m != n:
            if m < n:
                a.append(left.pop(0))
                m *= old[a[-1]]
            else:
                b.append(right.pop(0))
                n *= new[b[-1]]
        found.append((a, b))
    return found


def _blocks(
    layout: Layout, runs: list[tuple[list[int], list[int]]]
) -> list[tuple[list[int], tuple[int, ...]]]:
    """``runs``, those united of which labels depend jointly."""
    groups = [{i} for i in range(len(runs))]
    for axes, _ in layout.factors:
        met = [g for g in groups if any(axis in runs[i][0] for i in g for axis in axes)]
        groups = [g for g in groups if g not in met] + [set().union(*met)]
    found = []
    for group in groups:
        old = [axis for i in sorted(group) for axis in runs[i][0]]
        found.append((old, tuple(axis for i in sorted(group) for axis in runs[i][1])))
    return found


def pointwise(labels: Labels, operands: list[Layout], shape: Iterable[int]) -> Layout:
    """Operands broadcast to ``shape`` and combined value by value: their labels are joined."""
    shape = tuple(shape)
    while True:
        views = [_aligned(operand, shape) for operand in operands]
        if (uneven := _uneven(views)) is None:
            break
        labels.settle(uneven)
    joined: dict[tuple[int, ...], Ids] = {}
    for _, factors in views:
        for axes, ids in factors.items():
            order = np.argsort(axes)
            for wide, others in views:
                if wide & set(axes):
                    other = next((f for a, f in others.items() if set(a) == set(axes)), None)
                    if other is None:
                        labels.freeze(ids)
                    else:
                        own = next(a for a in others if set(a) == set(axes))
                        labels.join(ids.transpose(order), other.transpose(np.argsort(own)))
            if not any(set(known) == set(axes) for known in joined):
                joined[axes] = ids
    return Layout(labels, shape, tuple(joined.items()))


def _aligned(
    operand: Layout, shape: tuple[int, ...]
) -> tuple[set[int], dict[tuple[int, ...], Ids]]:
    """The axes of the result along which ``operand`` is not repeated, and its factors there."""
    offset = len(shape) - len(operand.shape)
    wide = {k + offset for k, size in enumerate(operand.shape) if size != 1}
    factors = {tuple(k + offset for k in axes): ids for axes, ids in operand.factors}
    return wide, factors


def _uneven(views: list[tuple[set[int], dict[tuple[int, ...], Ids]]]) -> Ids | None:
    """A joint factor of one operand that another one, which is wide there, does not have."""
    for _, factors in views:
        for axes, ids in factors.items():
            for wide, others in views:
                same = any(set(other) == set(axes) for other in others)
                if len(axes) > 1 and wide & set(axes) and not same:
                    return ids
    return None
