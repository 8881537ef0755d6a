"""How labels go through what computes with weights: products, convolutions, norms, recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from qkit.pruning.facts import Cost, Count, Facts
from qkit.pruning.labels import Ids, Layout, pointwise

Args = Any  # the arguments of an operation by the names of its schema; tensors are Layouts


def linear(facts: Facts, a: Args) -> Layout:
    """``x W^T + b``: the columns of W go with the features of x, the rows and b with the output."""
    x, weight = a.input, a.weight
    facts.labels.join(x.ids(-1), weight.ids(1))
    return _product(facts, a, x, weight.ids(1), weight.ids(0), a.bias)


def _product(
    facts: Facts, a: Args, x: Layout, inside: Ids, rows: Ids, bias: Layout | None
) -> Layout:
    last = len(x.shape) - 1
    if bias is not None:
        facts.labels.join(rows, bias.ids(-1))
    facts.make(a.module, rows)
    facts.costs.append(Cost(a.module, math.prod(x.shape[:-1]), (inside, rows)))
    out = x.moved(a.shape, {axis: axis for axis in range(last)})
    return Layout(facts.labels, a.shape, (*out.factors, ((last,), rows)))


def addmm(facts: Facts, a: Args) -> Layout:
    """``b + x W``: a linear layer with its weight turned, where W is a parameter."""
    product = matmul(facts, SimpleNamespace(**vars(a) | {"self": a.mat1, "other": a.mat2}))
    return pointwise(facts.labels, [product, a.self], a.shape)


def matmul(facts: Facts, a: Args) -> Layout:
    """Batches of products ``A B``; what is summed over goes together."""
    x, y = a.self, getattr(a, "other", None) or a.mat2
    if len(x.shape) < 2 or len(y.shape) < 2:
        return stop(facts, a)
    facts.labels.join(x.ids(-1), y.ids(-2))
    rank = len(a.shape)
    sides = []
    for side, kept in ((x, -2), (y, -1)):
        where = {axis: axis + rank - len(side.shape) for axis in range(len(side.shape) - 2)}
        shape = [1] * (rank - len(side.shape)) + list(side.shape[:-2]) + [1, 1]
        shape[kept] = side.shape[kept]
        sides.append(side.moved(shape, where | {len(side.shape) + kept: rank + kept}))
    if len(y.shape) == 2:
        facts.make(a.module, sides[1].ids(-1))
    axes = (x.ids(-1), x.ids(-2), y.ids(-1))
    batch = tuple(max((s.ids(k) for s in (x, y) if len(s.shape) == rank), key=len)
                  for k in range(rank - 2))  # fmt: skip
    facts.costs.append(Cost(a.module, 1, axes + batch))
    return pointwise(facts.labels, sides, a.shape)


def einsum(facts: Facts, a: Args) -> Layout:
    """Axes of one letter go together."""
    terms, _, out = a.equation.replace(" ", "").partition("->")
    terms = terms.split(",")
    if "." in a.equation or not out or any(len(set(t)) != len(t) for t in terms):
        return stop(facts, a)
    known: dict[str, Ids] = {}
    for term, operand in zip(terms, a.tensors, strict=True):
        for axis, letter in enumerate(term):
            ids = operand.ids(axis)
            facts.labels.join(ids, known.setdefault(letter, ids))
    facts.costs.append(Cost(a.module, 1, tuple(known.values())))
    return Layout.of(facts.labels, a.shape, {k: known[letter] for k, letter in enumerate(out)})


def attention(facts: Facts, a: Args) -> Layout:
    """Scaled products of queries and keys ``[..., heads, length, size]``, applied to the values.

    Heads stand or fall as a whole. The scale is that of the size of a head, which is kept.
    """
    q, k, v, mask = a.query, a.key, a.value, a.attn_mask
    q.freeze(-1)
    k.freeze(-1)
    v.freeze(-2)
    if len(q.shape) > 3:
        heads = q.ids(-3)
        for other in (k, v):
            # With grouped queries, each key serves as many heads in a row.
            facts.labels.join(heads.reshape(other.shape[-3], -1), other.ids(-3)[:, None])
        if mask is not None and len(mask.shape) > 2 and mask.shape[-3] > 1:
            facts.labels.join(heads, mask.ids(-3))
    size = math.prod(q.shape) * k.shape[-2] + math.prod(a.shape) * k.shape[-2]
    heads = q.ids(-3) if len(q.shape) > 3 else np.zeros(1, np.int64)
    facts.costs.append(Cost(a.module, size // len(heads), (heads,)))
    out = q.moved(a.shape, {axis: axis for axis in range(len(q.shape) - 1)})
    last = len(a.shape) - 1
    return Layout(facts.labels, a.shape, (*out.factors, ((last,), v.ids(-1))))


def convolution(facts: Facts, a: Args) -> Layout:
    """Channels of x go with axis 1 of the weight, its axis 0 with the output; turned: the reverse.

    In ``groups`` every group keeps as many channels as the others, or whole groups go; the
    finer of the two. Depthwise, each input goes with its outputs.
    """
    x, weight, turned = a.input, a.weight, "transpose" in a.op
    labels, groups, batched = facts.labels, a.groups, len(a.input.shape) == len(a.weight.shape)
    channel = int(batched)
    given = x.ids(channel)
    if turned:
        labels.join(given, weight.ids(0))
        rows = np.tile(weight.ids(1), groups)
        each = (len(given) // groups, weight.shape[1])
    else:
        rows = weight.ids(0)
        each = (weight.shape[1], len(rows) // groups)
    if groups > min(each):  # whole groups
        whole = given.reshape(groups, -1)
        labels.settle(whole)
        labels.freeze(weight.ids(1))
        if turned:  # the weight does not tell its outputs apart by group
            rows = np.repeat(whole[:, 0], each[1])
        labels.join(whole[:, :1], rows.reshape(groups, -1))
        facts.counts.append(Count(a.module, "groups", whole[:, 0]))
    else:
        if not turned:
            labels.join(given, np.tile(weight.ids(1), groups))
        for ids in (given, rows):
            labels.settle(ids.reshape(groups, -1).T)
    if groups > 1:
        for attribute, ids in (("in_channels", given), ("out_channels", rows)):
            facts.counts.append(Count(a.module, attribute, ids))
    if a.bias is not None:
        labels.join(rows, a.bias.ids(0))
    facts.make(a.module, rows)
    pixels = x if turned else Layout(labels, a.shape)
    size = math.prod(pixels.shape[channel + 1 :]) * math.prod(weight.shape[2:])
    size *= x.shape[0] if batched else 1
    # Of each group: as many products as inputs and outputs.
    facts.costs.append(Cost(a.module, size, (given, weight.ids(1)) if turned
                            else (weight.ids(1), rows)))  # fmt: skip
    x.freeze(*range(channel + 1, len(x.shape)))
    out = x.moved(a.shape, {0: 0} if batched else {})
    return Layout(labels, a.shape, (*out.factors, ((channel,), rows)))


def channel_norm(facts: Facts, a: Args) -> Layout:
    """Each channel by itself (batch and instance normalisation): exact, whatever else goes."""
    x = a.input
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (tensor := getattr(a, name, None)) is not None:
            facts.labels.join(x.ids(1), tensor.ids(0))
    return Layout(facts.labels, a.shape, tuple(x.factors))


def last_norm(facts: Facts, a: Args) -> Layout:
    """Over the last axes (layer and RMS normalisation)."""
    x, count = a.input, len(a.normalized_shape)
    first = len(x.shape) - count
    facts.reduced(x, *range(first, len(x.shape)))
    for tensor in (a.weight, getattr(a, "bias", None)):
        if tensor is not None:
            for axis in range(count):
                facts.labels.join(x.ids(first + axis), tensor.ids(axis))
    return Layout(facts.labels, a.shape, tuple(x.factors))


def group_norm(facts: Facts, a: Args) -> Layout:
    """Whole groups of channels go, and what is left is as it was."""
    x, labels = a.input, facts.labels
    ids = x.ids(1).reshape(a.num_groups, -1)
    labels.settle(ids)
    if a.num_groups == 1:
        labels.freeze(ids)
    facts.counts.append(Count(a.module, "num_groups", ids))
    for tensor in (a.weight, a.bias):
        if tensor is not None:
            labels.join(x.ids(1), tensor.ids(0))
    return Layout(labels, a.shape, tuple(x.factors))


def prelu(facts: Facts, a: Args) -> Layout:
    """A slope for each channel, or one for all."""
    x, weight = a.self, a.weight
    if weight.shape[-1] > 1:
        facts.labels.join(x.ids(1 if len(x.shape) > 1 else 0), weight.ids(0))
    return Layout(facts.labels, a.shape, tuple(x.factors))


def embedding(facts: Facts, a: Args) -> Layout:
    """Rows are looked up by number, and stay; their features are the last axis."""
    weight, indices = a.weight, a.indices
    weight.freeze(0)
    facts.make(a.module, weight.ids(1))
    out = indices.moved(a.shape, {axis: axis for axis in range(len(indices.shape))})
    last = len(a.shape) - 1
    return Layout(facts.labels, a.shape, (*out.factors, ((last,), weight.ids(1))))


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(facts: Facts, a: Args) -> tuple[Layout, ...]:
    """A stack of layers of one hidden size: a unit goes in every layer and direction at once.

    Each gate is a block of rows of the weights.
    """
    labels, gates = facts.labels, _GATES[a.op.partition(".")[0].removeprefix("aten::")]
    x, params, sides = a.input, a.params, 1 + bool(a.bidirectional)
    each = len(params) // (a.num_layers * sides)
    hidden = params[1].ids(1)
    if each != (4 if a.has_biases else 2):  # a projection, whose size is another one
        stop(facts, a)
        return tuple(Layout(labels, shape) for shape in a.shapes)
    steps = math.prod(x.shape[:-1])
    given = x.ids(-1)
    for layer in range(a.num_layers):
        for side in range(sides):
            at = (layer * sides + side) * each
            w_in, w_hidden, *biases = params[at : at + each]
            labels.join(w_in.ids(1), given)
            labels.join(w_hidden.ids(1), hidden)
            for tensor in (w_in, w_hidden, *biases):
                labels.join(tensor.ids(0), np.tile(hidden, gates))
            facts.costs += [
                Cost(a.module, steps, (w_in.ids(0), w_in.ids(1))),
                Cost(a.module, steps, (w_hidden.ids(0), w_hidden.ids(1))),
            ]
        given = np.tile(hidden, sides)
    facts.make(a.module, hidden)
    _start(facts, a.hx, hidden)
    out = x.moved(a.shapes[0], {axis: axis for axis in range(len(x.shape) - 1)})
    last = len(a.shapes[0]) - 1
    first = Layout(labels, a.shapes[0], (*out.factors, ((last,), given)))
    return (first, *(Layout.of(labels, s, {len(s) - 1: hidden}) for s in a.shapes[1:]))


def _start(facts: Facts, given: Any, hidden: Ids) -> None:
    """The state that a recurrent layer starts from; the code that made zeros says their size."""
    for state in given if isinstance(given, list | tuple) else [given]:
        if state.blank is None:
            facts.labels.join(state.ids(-1), hidden)
        else:
            last = len(state.shape) - 1
            facts.mention(*state.blank, Layout.of(facts.labels, state.shape, {last: hidden}))


def cell(facts: Facts, a: Args) -> Layout | tuple[Layout, ...]:
    """One step of a recurrent layer."""
    labels, hidden = facts.labels, a.w_hh.ids(1)
    labels.join(a.input.ids(-1), a.w_ih.ids(1))
    gates = a.w_hh.shape[0] // a.w_hh.shape[1]
    for tensor in (a.w_ih, a.w_hh, a.b_ih, a.b_hh):
        if tensor is not None:
            labels.join(tensor.ids(0), np.tile(hidden, gates))
    _start(facts, a.hx, hidden)
    facts.make(a.module, hidden)
    steps = math.prod(a.input.shape[:-1])
    for weight in (a.w_ih, a.w_hh):
        facts.costs.append(Cost(a.module, steps, (weight.ids(0), weight.ids(1))))
    outs = tuple(Layout.of(labels, s, {len(s) - 1: hidden}) for s in a.shapes)
    return outs if len(outs) > 1 else outs[0]


def stop(facts: Facts, a: Args) -> Any:
    """An operation of which nothing is known: what it reads and gives cannot be removed."""
    found = False
    for value in vars(a).values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Layout):
                found = found or bool(each.factors)
                each.freeze()
    if found:
        facts.stops[a.op] += 1
    outs = tuple(Layout(facts.labels, shape) for shape in a.shapes)
    return outs if len(outs) != 1 else outs[0]


_NAMES: dict[Callable[[Facts, Args], Any], str] = {
    linear: "linear",
    addmm: "addmm",
    matmul: "matmul mm bmm",
    einsum: "einsum",
    attention: "scaled_dot_product_attention",
    convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    channel_norm: "batch_norm instance_norm",
    last_norm: "layer_norm rms_norm",
    group_norm: "group_norm",
    prelu: "prelu",
    embedding: "embedding",
    recurrent: "lstm gru rnn_tanh rnn_relu",
    cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
