"""How labels go through what moves values about: views, splits, joins, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from qkit.pruning.compute import Args, stop
from qkit.pruning.facts import Facts
from qkit.pruning.labels import Factor, Ids, Layout, pointwise


def view(facts: Facts, a: Args) -> Layout:
    """The same values in another shape."""
    out = a.self.reshaped(a.shape)
    if math.prod(out.shape) != math.prod(a.self.shape):
        return stop(facts, a)
    facts.mention(a.modules, a.line, out)
    return out


def permute(facts: Facts, a: Args) -> Layout:
    """Axes in another order."""
    x = a.self
    order = list(range(len(x.shape)))
    if "dims" in vars(a):
        order = [dim % len(order) for dim in a.dims]
    else:
        pair = [getattr(a, name) for name in ("dim0", "dim1") if name in vars(a)] or [-2, -1]
        if len(order) > 1:
            first, second = (dim % len(order) for dim in pair)
            order[first], order[second] = order[second], order[first]
    return x.moved(a.shape, {old: new for new, old in enumerate(order)})


def expand(facts: Facts, a: Args) -> Layout:
    """Values repeated along axes of size 1, and along new ones in front."""
    x, offset = a.self, len(a.shape) - len(a.self.shape)
    return x.moved(a.shape, {axis: axis + offset for axis in range(len(x.shape))})


def _taken(facts: Facts, x: Layout, dim: int, index: Any, shape: Iterable[int]) -> Layout:
    """``x`` at some places of ``dim``: a slice, or one place, whose axis is then gone."""
    dim %= len(x.shape)
    shape, factors = tuple(shape), []
    gone = not isinstance(index, slice)
    for axes, ids in x.factors:
        if dim in axes:
            at = axes.index(dim)
            if len(axes) > 1 and at and not gone:  # part of each row: rows stay whole
                facts.labels.settle(ids)
            ids = ids[(slice(None),) * at + (index,)]
            axes = tuple(axis for axis in axes if axis != dim) if gone else axes
        if axes:
            factors.append((tuple(axis - (gone and axis > dim) for axis in axes), ids))
        else:
            facts.labels.freeze(ids)
    return Layout(facts.labels, shape, tuple(factors))


def select(facts: Facts, a: Args) -> Layout:
    """One place along an axis."""
    return _taken(facts, a.self, a.dim, a.index, a.shape)


def narrow(facts: Facts, a: Args) -> Layout:
    """A slice along an axis."""
    start = (a.start or 0) % (a.self.shape[a.dim] + 1) if (a.start or 0) < 0 else (a.start or 0)
    step = getattr(a, "step", 1)
    stop_at = start + a.shape[a.dim] * step
    out = _taken(facts, a.self, a.dim, slice(start, stop_at, step), a.shape)
    facts.mention(a.modules, a.line, out)
    return out


def split(facts: Facts, a: Args) -> tuple[Layout, ...]:
    """Parts along an axis, one behind the other."""
    outs, start = [], 0
    for shape in a.shapes:
        stop_at = start + shape[a.dim]
        outs.append(_taken(facts, a.self, a.dim, slice(start, stop_at), shape))
        start = stop_at
    if len(set(a.shapes)) == 1:  # the code splits evenly, whatever the size
        _as_one(facts, outs, a.dim)
    elif a.op.startswith(("aten::chunk", "aten::split.Tensor", "aten::tensor_split")):
        a.self.freeze(a.dim)
    facts.mention(a.modules, a.line, *outs)
    return tuple(outs)


def _as_one(facts: Facts, parts: list[Layout], dim: int) -> None:
    """What goes along ``dim`` of one of the ``parts`` goes in all."""
    axis = dim % len(parts[0].shape)
    for part in parts[1:]:
        for factor, first in zip(part.given, parts[0].given, strict=True):
            if axis in factor[0]:
                facts.labels.join(factor[1], first[1])


def unbind(facts: Facts, a: Args) -> tuple[Layout, ...]:
    """All places along an axis."""
    return tuple(_taken(facts, a.self, a.dim, at, s) for at, s in enumerate(a.shapes))


def cat(facts: Facts, a: Args) -> Layout:
    """Parts joined along an axis; along the others they go together."""
    parts = [part for part in a.tensors if len(part.shape) == len(a.shape)]
    dim = a.dim % len(a.shape)
    joined = np.concatenate([part.ids(dim) for part in parts])
    rest = list(a.shape)
    rest[dim] = 1
    others = [
        part.moved(rest, {axis: axis for axis in range(len(rest)) if axis != dim}) for part in parts
    ]
    out = pointwise(facts.labels, others, rest)
    return Layout(facts.labels, a.shape, (*out.factors, ((dim,), joined)))


def stack(facts: Facts, a: Args) -> Layout:
    """Parts side by side along a new axis."""
    dim, parts = a.dim % len(a.shape), a.tensors
    out = pointwise(facts.labels, list(parts), parts[0].shape)
    return out.moved(a.shape, {k: k + (k >= dim) for k in range(len(parts[0].shape))})


def same(facts: Facts, a: Args) -> Layout:
    """One tensor in, the labels as they were."""
    return Layout(facts.labels, a.shape, tuple(a.first.factors), a.first.blank)


def values(facts: Facts, a: Args) -> Layout:
    """Value by value; of what the code made of sizes alone, something is made that is so too."""
    out = pointwise(facts.labels, a.tensors_in, a.shape)
    made = all(tensor.blank for tensor in a.tensors_in)
    return replace(out, blank=a.first.blank) if made and a.tensors_in else out


def along(facts: Facts, a: Args) -> Layout:
    """Each value depends on all along ``dim``, which stays as it is (softmax, cumulative sum)."""
    dims = a.dim if isinstance(a.dim, list | tuple) else [a.dim]
    a.self.freeze(*dims)
    return same(facts, a)


def reduce(facts: Facts, a: Args) -> Any:
    """Axes that are summed up, averaged, or of which the largest is taken."""
    x, rank = a.first, len(a.first.shape)
    dims = getattr(a, "dim", None)
    dims = list(range(rank)) if dims is None or dims == [] else dims
    dims = {dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])}
    keeps = bool(getattr(a, "keepdim", False))
    if not a.op.startswith("aten::sum"):
        facts.reduced(x, *dims)
    kept = [axis for axis in range(rank) if axis not in dims]
    where = {axis: axis if keeps else new for new, axis in enumerate(kept)}
    outs = tuple(x.moved(shape, where) for shape in a.shapes)
    return outs if len(outs) > 1 else outs[0]


def pool(facts: Facts, a: Args) -> Any:
    """The last axes are pooled or resized, as many as the name says."""
    x = a.first
    count = next(int(char) for char in a.op if char.isdigit())
    x.freeze(*range(len(x.shape) - count, len(x.shape)))
    outs = tuple(x.moved(s, {k: k for k in range(len(x.shape) - count)}) for s in a.shapes)
    return outs if len(outs) > 1 else outs[0]


def pad(facts: Facts, a: Args) -> Layout:
    """Values put before and behind along the last axes; those stay."""
    x, factors = a.self, []
    amounts = {len(x.shape) - 1 - k // 2: a.pad[k : k + 2] for k in range(0, len(a.pad), 2)}
    amounts = {axis: pair for axis, pair in amounts.items() if any(pair)}
    for axis, (before, behind) in amounts.items():
        ids = x.ids(axis)
        if getattr(a, "mode", "constant") != "constant" or min(before, behind) < 0:
            facts.labels.freeze(ids)
        elif ids.any():
            factors.append(((axis,), np.pad(ids, (before, behind))))
    out = x.moved(a.shape, {k: k for k in range(len(x.shape)) if k not in amounts})
    return Layout(facts.labels, a.shape, (*out.factors, *factors))


def shuffle(facts: Facts, a: Args) -> Layout:
    """Pixel shuffle: the channels of one output stand behind one another."""
    x, ids = a.self, a.self.ids(-3)
    up = a.op.startswith("aten::pixel_shuffle")
    if up:
        runs = ids.reshape(a.shape[-3], -1)
        facts.labels.settle(runs)
        ids = runs[:, 0]
    else:
        ids = np.repeat(ids, a.shape[-3] // len(ids))
    x.freeze(-2, -1)
    rank = len(a.shape)
    out = x.moved(a.shape, {axis: axis for axis in range(rank - 3)})
    return Layout(facts.labels, a.shape, (*out.factors, ((rank - 3,), ids)))


def roll(facts: Facts, a: Args) -> Layout:
    """Values that move along ``dims``, which stay as they are."""
    a.self.freeze(*a.dims)
    return same(facts, a)


def repeat(facts: Facts, a: Args) -> Layout:
    """Whole copies, one behind the other."""
    x, offset, factors = a.self, len(a.shape) - len(a.self.shape), []
    for axis, size in enumerate(x.shape):
        times = a.repeats[axis + offset]
        ids: Ids = x.ids(axis)
        if size > 1 and ids.any():
            factors.append(((axis + offset,), np.tile(ids, times)))
    return Layout(facts.labels, a.shape, tuple[Factor, ...](factors))


def interleave(facts: Facts, a: Args) -> Layout:
    """Copies of each place next to it."""
    if not isinstance(a.repeats, int) or a.dim is None:
        return stop(facts, a)
    x, dim = a.self, a.dim % len(a.self.shape)
    ids = np.repeat(x.ids(dim), a.repeats)
    out = x.moved(a.shape, {k: k for k in range(len(a.shape)) if k != dim})
    return Layout(facts.labels, a.shape, (*out.factors, ((dim,), ids)))


def index(facts: Facts, a: Args) -> Layout:
    """Rows by number: ``x[:, indices]``. What is looked up in stays."""
    given = [(at, each) for at, each in enumerate(a.indices) if each is not None]
    if len(given) != 1:
        return stop(facts, a)
    (at, indices), x = given[0], a.self
    x.freeze(at)
    longer = len(indices.shape) - 1
    where = {k: k + longer * (k > at) for k in range(len(x.shape)) if k != at}
    return x.moved(a.shape, where)


def index_add(facts: Facts, a: Args) -> Layout:
    """Rows added at numbered rows."""
    a.self.freeze(a.dim)
    a.source.freeze(a.dim)
    if a.self.blank:
        return Layout(facts.labels, a.shape, tuple(a.source.factors))
    rest = [1 if k == a.dim % len(a.shape) else size for k, size in enumerate(a.shape)]
    where = {k: k for k, size in enumerate(rest) if size != 1}
    out = pointwise(facts.labels, [x.moved(rest, where) for x in (a.self, a.source)], rest)
    return Layout(facts.labels, a.shape, tuple(out.factors))


def blank(facts: Facts, a: Args) -> Layout:
    """Made by the code: zeros, ones, numbers in a row."""
    return Layout(facts.labels, a.shape, blank=(a.modules, a.line))


_NAMES: dict[Callable[[Facts, Any], Any], str] = {
    view: "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as",
    permute: "permute transpose t numpy_T mT swapaxes adjoint matrix_H",
    expand: "expand expand_as broadcast_to",
    select: "select",
    narrow: "slice narrow",
    split: "split split_with_sizes chunk tensor_split unsafe_split",
    unbind: "unbind",
    cat: "cat concat",
    stack: "stack",
    same: "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as "
    "float lift_fresh_copy relu6 hardswish hardsigmoid silu gelu selu celu elu mish softplus "
    "log_sigmoid softsign zeros_like ones_like full_like rand_like randn_like empty_like bernoulli "
    "nan_to_num _assert_tensor_metadata",
    values: "where masked_fill copy rsub lerp addcmul addcdiv",
    along: "softmax log_softmax _softmax _log_softmax cumsum",
    reduce: "sum mean amax amin max min logsumexp prod var std norm linalg_vector_norm any all",
    pool: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "max_pool2d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
    "_upsample_nearest_exact2d",
    pad: "pad constant_pad_nd",
    shuffle: "pixel_shuffle pixel_unshuffle",
    roll: "roll flip",
    repeat: "repeat",
    interleave: "repeat_interleave",
    index: "index",
    index_add: "index_add",
    blank: "zeros ones full arange new_zeros new_ones new_full empty new_empty eye linspace "
    "scalar_tensor rand randn",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
