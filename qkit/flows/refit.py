"""Layers of a calibrated program fitted to the float one, by what quantization makes of their
inputs: biases alone, or weights too (:mod:`qkit.algorithms.least_squares`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.algorithms import CALIBRATED, Joint, Stats, least_squares
from qkit.flows.vectors import groups_of, vectors
from qkit.graph.kinds import attribute
from qkit.graph.norms import put
from qkit.models import Inputs
from qkit.numerics import dequantize

# Of fewer samples, the error of an estimated mean may be more than what it corrects.
LEAST_SAMPLES = 8
# Layers with longer rows keep their weights: equations of so many unknowns take seconds each.
MOST_COLUMNS = 1280
# Values of inputs whose products are summed at a time.
PIECE = 1 << 23


def refit(prepared: fx.GraphModule, layers: Mapping[fx.Node, str | None], inputs: Inputs) -> None:
    """Fit ``layers``, one after the other, to their outputs in the float program.

    A layer's inputs are those that the quantized program gives it, with the layers before it
    fitted. Biases get what quantization takes from the mean of the outputs: Nagel et al. 2019
    (arXiv 1906.04721), section 4.2, from data (appendix D). Where a layer has the name of a
    rounding algorithm (or ``rtn``) and not None, its weight is fitted by least squares before it is
    rounded by that. Parameters that several layers share stay.
    """
    from qkit.graph.simulate import Beside

    uses: Counter[str] = Counter()
    for node in prepared.graph.nodes:
        if node.op == "call_function":
            uses.update(str(each.target) for each in map(_behind, node.all_input_nodes))

    def own(parameter: fx.Node) -> bool:
        return uses[str(parameter.target)] == 1

    def fit(node: fx.Node, rounded: Any, wanted: Tensor) -> Tensor:
        operator: Any = node.target
        source, rounding = _bias(node), layers[node]
        if source is None or not own(source):
            return operator(*rounded)  # type: ignore[no-any-return]
        x, weight, _, *rest = rounded
        bias = attribute(prepared, source)
        if rounding and own(weight_node(node)) and weight[0].numel() <= MOST_COLUMNS:
            weight = _fitted(prepared, node, rounding, rounded, wanted)
        lost = _mean(wanted - operator(x, weight, bias, *rest), weight).float()
        put(prepared, str(source.target), nn.Parameter(bias + lost, requires_grad=False))
        return operator(x, weight, bias + lost, *rest)  # type: ignore[no-any-return]

    with torch.no_grad():
        Beside(prepared, layers, fit).call(inputs.args, inputs.kwargs)


def weight_node(node: fx.Node) -> fx.Node:
    """The parameter of a layer, also behind its observer."""
    weight: fx.Node = _behind(node.args[1])
    return weight


def round_weight(prepared: fx.GraphModule, node: fx.Node, name: str, stats: Stats) -> None:
    """Give the weight of ``node`` numbers that its observer's scale has codes for, by the algorithm
    ``name``."""
    from qkit.graph.observe import PerChannelRange

    weight, watcher = weight_node(node), node.args[1]
    observer = prepared.get_submodule(str(watcher.target))  # type: ignore[union-attr]
    if not (isinstance(observer, PerChannelRange) and stats.vectors):
        return
    before = attribute(prepared, weight)
    spec = observer.observer.spec
    q = CALIBRATED[name](before.flatten(1), spec, stats, name=str(weight.target))
    rounded = dequantize(q).reshape(before.shape)
    put(prepared, str(weight.target), nn.Parameter(rounded, requires_grad=False))


def _fitted(
    prepared: fx.GraphModule,
    node: fx.Node,
    rounding: str,
    rounded: Any,
    wanted: Tensor,
) -> Tensor:
    """The weight of ``node``, fitted, as the converted program will have it."""
    parameter = weight_node(node)
    before = attribute(prepared, parameter)
    halves = _halves(node, rounded, before.shape, wanted)
    after = least_squares(before.flatten(1), halves).reshape(before.shape)
    put(prepared, str(parameter.target), nn.Parameter(after, requires_grad=False))
    observer: Any = prepared.get_submodule(str(node.args[1].target))  # type: ignore[union-attr]
    observer.observer.state = None  # it looks at a weight once
    observer(after)
    if rounding in CALIBRATED:
        both = halves[0] + halves[1]
        stats = Stats(both.covariance[0].float(), both.count)
        round_weight(prepared, node, rounding, stats)
    rounds: Tensor = observer.rounded(attribute(prepared, parameter))
    return rounds


def _halves(node: fx.Node, args: Any, shape: torch.Size, wanted: Tensor) -> tuple[Joint, Joint]:
    """What each half of the samples tells of the layer ``node``."""
    x, *rest = args
    groups = groups_of(node)
    size = wanted[0].numel() // shape[0] * groups * shape[1:].numel()
    at = None
    halves = []
    for xs, ys in zip(x.chunk(2), wanted.chunk(2), strict=True):
        half = None
        pieces = (each.split(max(1, PIECE // size)) for each in (xs, ys))
        for some, made in zip(*pieces, strict=True):
            rows = made.movedim(1, -1) if len(shape) > 2 else made
            outputs = rows.reshape(-1, groups, shape[0] // groups).movedim(1, 0)
            joint = Joint.of(vectors((some, *rest), shape), outputs, at)
            at = joint.at
            half = joint if half is None else half + joint
        assert half is not None
        halves.append(half)
    first, second = halves
    return first, second


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """The mean of each channel of what a layer with ``weight`` made."""
    axis = 1 if weight.dim() > 2 else value.dim() - 1
    return value.double().movedim(axis, 0).flatten(1).mean(1)


def _bias(node: fx.Node) -> fx.Node | None:
    """The parameter that is the bias of ``node``, also behind its observer."""
    bias = _behind(node.args[2]) if len(node.args) > 2 else None
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _behind(value: Any) -> Any:
    """What an observer watches; other values themselves."""
    watched = isinstance(value, fx.Node) and value.op == "call_module"
    return value.args[0] if watched else value
