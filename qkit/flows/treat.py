"""What static int8 gains from calibration data besides ranges, by the names in ``--algorithm``.

==================  ================================================================================
``equalization``    cross-layer equalization: channels get weights of like ranges on both sides
``smoothquant``     channels of activations get like ranges, at the cost of the weights behind them
``gptq``,           which way each weight is rounded is learnt from the second moments of its inputs
``adaround``        (:mod:`qkit.algorithms`)
``bias-correction`` each layer's outputs get the means back that they have in the float model
==================  ================================================================================

The first two change what is quantized (:func:`before`), and leave what the float model computes;
the others how (:func:`after`). Any of them may be joined by ``+``; that is their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.algorithms import CALIBRATED, Stats
from qkit.algorithms.equalization import below, cross_layer, smooth
from qkit.flows.calibrate import parts
from qkit.flows.data import Data
from qkit.graph.kinds import attribute, bias_of
from qkit.graph.links import Link, Links, ceiling_of, channel_axis
from qkit.graph.norms import give_bias, merge, put
from qkit.graph.sites import Site
from qkit.models import Inputs
from qkit.nn import QUANTIZED
from qkit.numerics import dequantize
from qkit.spec import Recipe, Rule

EQUALIZATION, SMOOTHQUANT, BIAS = "equalization", "smoothquant", "bias-correction"
# Those that change what is quantized, but not what the float model computes.
HARMLESS = (EQUALIZATION, SMOOTHQUANT)
# Pairs of neighbours are equalized in turn until no factor is this far from 1, or so many times.
SETTLED, ROUNDS = 0.01, 40
# Samples whose outputs are held in memory, all of one layer at a time, to correct biases.
BIAS_SAMPLES = 32


def harmless(recipe: Recipe) -> Recipe:
    """``recipe`` without what changes the float program, beside which layers are judged."""

    def kept(rule: Rule) -> Rule:
        names = [name for name in rule.algorithms if name in HARMLESS]
        return replace(rule, algorithm="+".join(names or ["rtn"]))

    return replace(recipe, rules=tuple(map(kept, recipe.rules)))


def before(module: fx.GraphModule, sites: Sequence[Site], data: Data) -> list[str]:
    """Change the captured ``module`` as ``sites`` ask for, before it is prepared; remarks."""
    if all(site.algorithms == ("rtn",) for site in sites):
        return []
    merge(module)
    notes = []
    if _named(sites, EQUALIZATION):
        links, found = _links(module, sites, EQUALIZATION)
        _equalize(links, found, data)
        notes.append(f"equalization: {len(found)} links between layers that a factor may pass")
    if _named(sites, SMOOTHQUANT):
        links, found = _links(module, sites, SMOOTHQUANT)
        _smooth(links, found, data)
        apart = sum(link.apart for link in found)
        notes.append(
            f"smoothquant: {len(found)} links between layers that a factor may pass"
            + (f", {apart} of them by a product of its own" if apart else "")
        )
    uses = [site.weight for site in sites]
    for site in _named(sites, BIAS):
        name = site.weight
        if name is not None and uses.count(name) == 1 and bias_of(site.node) is None:
            give_bias(module, site.node, name)
    module.graph.lint()
    module.recompile()
    return notes


def after(
    prepared: fx.GraphModule, sites: Sequence[Site], data: Data, inputs: Callable[[int], Inputs]
) -> None:
    """Change the weights and biases of the calibrated module ``prepared`` as ``sites`` ask for.

    ``inputs`` gives some samples that the program takes as one batch.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    for name in CALIBRATED:
        if chosen := _named(sites, name):
            _round(prepared, [nodes[site.node.name] for site in chosen], name, data)
    if chosen := _named(sites, BIAS):
        _correct(prepared, [nodes[site.node.name] for site in chosen], inputs(BIAS_SAMPLES))


def _named(sites: Iterable[Site], algorithm: str) -> list[Site]:
    """The quantized layers by whose rule ``algorithm`` is used."""
    return [
        site
        for site in sites
        if site.scheme is not None and algorithm in site.algorithms and site.kind != "LSTM"
    ]


def _links(module: fx.GraphModule, sites: Sequence[Site], name: str) -> tuple[Links, list[Link]]:
    """The links of ``module`` whose layers all ask for the algorithm ``name``."""
    links = Links(module)
    asked = {site.node for site in _named(sites, name)}
    layers = {site.node for site in sites}
    found = [
        link
        for link in links.all
        if asked.issuperset(link.readers)
        and (link.maker in asked or link.maker not in layers)
        and not (link.apart and name != SMOOTHQUANT)
    ]
    return links, found


def magnitudes(
    module: fx.GraphModule, watched: Mapping[fx.Node, int], data: Data
) -> dict[fx.Node, Tensor]:
    """The greatest magnitude of each channel of nodes, whose channels lie along the given axis."""
    from qkit.graph.simulate import Simulated

    found: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, args: Any, value: Tensor) -> Tensor:
        most = value.detach().abs().movedim(watched[node], 0).flatten(1).amax(1)
        found[node] = torch.maximum(found[node], most) if node in found else most
        return value

    program = Simulated(module, [node.name for node in watched], see)
    with torch.no_grad():
        for batch in data.stream():
            program.forward(batch.args, batch.kwargs)
    return found


def _equalize(links: Links, found: list[Link], data: Data) -> None:
    clipped = {
        node: channel_axis(link.maker)
        for link in found
        for node in link.between
        if ceiling_of(node) is not None
    }
    greatest = magnitudes(links.module, clipped, data) if clipped else {}
    total = [torch.ones(link.channels, dtype=torch.float64) for link in found]
    for _ in range(ROUNDS):
        moved = 0.0
        for index, link in enumerate(found):
            whole = total[index] * cross_layer(links.made(link), links.read(link))
            for node in link.between:
                if (ceiling := ceiling_of(node)) is not None:
                    whole = below(whole, greatest[node], ceiling)
            factor = whole / total[index]
            links.scale(link, factor)
            total[index] = whole
            moved = max(moved, float((factor - 1).abs().max()))
        if moved < SETTLED:
            break


def _smooth(links: Links, found: list[Link], data: Data) -> None:
    watched = {}
    for link in found:
        for reader in link.readers:
            source = reader.args[0]
            assert isinstance(source, fx.Node)
            conv = attribute(links.module, _weight(reader)).dim() > 2
            watched[source] = 1 if conv else source.meta["val"].dim() - 1
        watched |= {n: channel_axis(link.maker) for n in link.between if ceiling_of(n) is not None}
    greatest = magnitudes(links.module, watched, data)
    for link in found:
        seen = [greatest[reader.args[0]] for reader in link.readers]  # type: ignore[index]
        factor = smooth(torch.stack(seen).amax(0), links.read(link))
        for node in link.between:
            if (ceiling := ceiling_of(node)) is not None:
                factor = below(factor, greatest[node], ceiling)
        links.scale(link, factor)


def _weight(node: fx.Node) -> fx.Node:
    """The parameter of a layer, also behind its observer."""
    weight: Any = node.args[1]
    return weight if weight.op == "get_attr" else weight.args[0]  # type: ignore[no-any-return]


def _round(prepared: fx.GraphModule, layers: list[fx.Node], name: str, data: Data) -> None:
    """Round the weights of ``layers`` by the algorithm ``name``: each becomes a number that its
    observer's scale has a code for."""
    from qkit.graph.observe import PerChannelRange
    from qkit.graph.simulate import Simulated

    by_name = {node.name: node for node in layers}
    shapes = {node.name: attribute(prepared, _weight(node)).shape for node in layers}
    columns = {each: shape[1:].numel() for each, shape in shapes.items()}
    groups = {each: _groups(node) for each, node in by_name.items()}
    for part in parts({each: 4 * groups[each] * columns[each] ** 2 for each in by_name}):
        stats = {each: Stats.empty(groups[each], columns[each]) for each in part}

        def see(node: fx.Node, args: Any, value: Any, stats: Any = stats) -> Any:
            stats[node.name].update(_vectors(args, shapes[node.name]))
            return value

        program = Simulated(prepared, part, see)
        with torch.no_grad():
            for batch in data.stream():
                program.forward(batch.args, batch.kwargs)
        for each in part:
            node = by_name[each]
            weight, watcher = _weight(node), node.args[1]
            observer = prepared.get_submodule(str(watcher.target))  # type: ignore[union-attr]
            if not (isinstance(observer, PerChannelRange) and stats[each].vectors):
                continue
            before = attribute(prepared, weight)
            spec = observer.observer.spec
            q = CALIBRATED[name](before.flatten(1), spec, stats[each], name=str(weight.target))
            rounded = dequantize(q).reshape(before.shape)
            put(prepared, str(weight.target), nn.Parameter(rounded, requires_grad=False))


def _groups(node: fx.Node) -> int:
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    return int(groups)


def _vectors(args: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """What a weight of ``shape`` is multiplied with, of the arguments of its operator:
    ``[groups, vectors, columns]``."""
    x: Tensor = args[0]
    n = len(shape) - 2
    if n == 0:
        return x.reshape(1, -1, x.shape[-1])
    given: list[Any] = list(args[3:7])
    stride, padding, dilation, groups = given + [1, 0, 1, 1][len(given) :]
    stride, dilation = (_each(v, n) for v in (stride, dilation))
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(shape[2:], dilation, strict=True)]
        around = [(total // 2, total - total // 2) for total in whole]
    else:
        around = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    layer = SimpleNamespace(
        kernel_size=tuple(shape[2:]),
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding_mode="zeros",
        _reversed_padding_repeated_twice=[p for pair in around[::-1] for p in pair],
    )
    convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n]
    vectors: Tensor = QUANTIZED[convolution].input_vectors(layer, x)
    return vectors


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A size for each dimension of space."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values


def _correct(prepared: fx.GraphModule, layers: list[fx.Node], inputs: Inputs) -> None:
    """Add to each bias what quantization takes from the mean of its outputs, layer by layer.

    A layer's inputs are those that the quantized program gives it, with the biases before it
    corrected. Nagel et al. 2019 (arXiv 1906.04721), section 4.2, from data (appendix D).
    """
    from qkit.graph.simulate import Simulated

    names = {node.name: _bias(node) for node in layers}
    chosen = [bias for bias in names.values() if bias is not None]
    shared = {bias for bias in chosen if chosen.count(bias) > 1}
    names = {name: bias for name, bias in names.items() if bias and bias not in shared}
    means: dict[str, Tensor] = {}

    def mean(args: Any, value: Tensor) -> Tensor:
        axis = 1 if args[1].dim() > 2 else value.dim() - 1
        return value.detach().double().movedim(axis, 0).flatten(1).mean(1)

    def note(node: fx.Node, args: Any, value: Tensor) -> Tensor:
        means[node.name] = mean(args, value)
        return value

    def correct(node: fx.Node, args: Any, value: Tensor) -> Tensor:
        lost = (means[node.name] - mean(args, value)).float()
        name = names[node.name]
        assert name is not None
        owner, _, leaf = name.rpartition(".")
        bias = getattr(prepared.get_submodule(owner), leaf).detach()
        put(prepared, name, nn.Parameter(bias + lost, requires_grad=False))
        return value + (lost.reshape(-1, *[1] * (args[1].dim() - 2)))

    with torch.no_grad():
        for see, rounding in ((note, False), (correct, True)):
            program = Simulated(prepared, names, see)
            program.forward(inputs.args, inputs.kwargs, rounding=rounding)


def _bias(node: fx.Node) -> str | None:
    """The name of the parameter that is the bias of ``node``, also behind its observer."""
    bias: Any = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node) and bias.op == "call_module":
        bias = bias.args[0]
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
