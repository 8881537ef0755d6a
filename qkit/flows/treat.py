"""What static int8 gains from calibration data besides ranges, by the names in ``--algorithm``.

==================  ================================================================================
``equalization``    cross-layer equalization: channels get weights of like ranges on both sides
``smoothquant``     channels of activations get like ranges, at the cost of the weights behind them
``gptq``,           which way each weight is rounded is learnt from the second moments of its inputs
``adaround``        (:mod:`qkit.algorithms`)
``bias-correction`` each layer's outputs get the means back that they have in the float model
``least-squares``   weights and biases are fitted, layer by layer, to what the errors of the layers
                    before have made of the inputs (:mod:`qkit.algorithms.least_squares`)
==================  ================================================================================

The first two change what is quantized (:func:`before`), and leave what the float model computes;
the others how (:func:`after`). Any of them may be joined by ``+``; that is their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qkit.algorithms import CALIBRATED, Stats
from qkit.algorithms.equalization import below, cross_layer, smooth
from qkit.flows.calibrate import parts
from qkit.flows.data import Data
from qkit.flows.refit import LEAST_SAMPLES, refit, round_weight, weight_node
from qkit.flows.vectors import groups_of, vectors
from qkit.graph.kinds import attribute, bias_of
from qkit.graph.links import Link, Links, ceiling_of, channel_axis
from qkit.graph.norms import give_bias, merge
from qkit.graph.sites import Site
from qkit.models import Inputs, leading
from qkit.spec import Recipe, Rule

EQUALIZATION, SMOOTHQUANT, BIAS = "equalization", "smoothquant", "bias-correction"
FIT = "least-squares"
# Those that change what is quantized, but not what the float model computes.
HARMLESS = (EQUALIZATION, SMOOTHQUANT)
# Pairs of neighbours are equalized in turn until no factor is this far from 1, or so many times.
SETTLED, ROUNDS = 0.01, 40
# Samples that layers are fitted to: what two of the nodes make of them is in memory at a time.
FIT_SAMPLES = 32


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
    uses = [site.weight for site in sites if not site.table]
    for site in _named(sites, BIAS, FIT):
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
    fitted = _named(sites, BIAS, FIT)
    given = inputs(FIT_SAMPLES) if fitted else None
    if given is None or leading(given) < LEAST_SAMPLES:
        fitted = []
    later = {site.node for site in fitted if FIT in site.algorithms}
    for name in CALIBRATED:
        chosen = [site.node for site in _named(sites, name) if site.node not in later]
        if chosen:
            _round(prepared, [nodes[node.name] for node in chosen], name, data)
    if given is not None and fitted:
        refit(prepared, {nodes[site.node.name]: _rounding(site) for site in fitted}, given)


def _named(sites: Iterable[Site], *algorithms: str) -> list[Site]:
    """The quantized layers by whose rule one of ``algorithms`` is used."""
    return [
        site
        for site in sites
        if site.scheme is not None
        and not set(algorithms).isdisjoint(site.algorithms)
        and site.kind != "LSTM"
    ]


def _rounding(site: Site) -> str | None:
    """By what the weight of ``site`` is rounded once it is fitted; None where only its bias is."""
    if FIT not in site.algorithms:
        return None
    return next((name for name in site.algorithms if name in CALIBRATED), "rtn")


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
            conv = attribute(links.module, weight_node(reader)).dim() > 2
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


def _round(prepared: fx.GraphModule, layers: list[fx.Node], name: str, data: Data) -> None:
    """Round the weights of ``layers`` by the algorithm ``name``: each becomes a number that its
    observer's scale has a code for."""
    from qkit.graph.simulate import Simulated

    by_name = {node.name: node for node in layers}
    shapes = {node.name: attribute(prepared, weight_node(node)).shape for node in layers}
    columns = {each: shape[1:].numel() for each, shape in shapes.items()}
    groups = {each: groups_of(node) for each, node in by_name.items()}
    for part in parts({each: 4 * groups[each] * columns[each] ** 2 for each in by_name}):
        stats = {each: Stats.empty(groups[each], columns[each]) for each in part}

        def see(node: fx.Node, args: Any, value: Any, stats: Any = stats) -> Any:
            stats[node.name].update(vectors(args, shapes[node.name]))
            return value

        program = Simulated(prepared, part, see)
        with torch.no_grad():
            for batch in data.stream():
                program.forward(batch.args, batch.kwargs)
        for each in part:
            round_weight(prepared, by_name[each], name, stats[each])
