"""The recipe-driven quantizer of the PT2E flow; and how to write another one in a dozen lines.

:class:`RecipeQuantizer` turns the rules of a :class:`~qkit.spec.Recipe` into annotations in the
shape that a runtime's kernels want (:mod:`qkit.graph.dialect`). One of your own needs two methods.
Linear layers only, activations affine per tensor, weights symmetric (-127..127) per channel::

    from torch import fx
    from qkit.graph.annotate import Quantizer, annotate_node, annotation
    from qkit.graph.kinds import kind_of
    from qkit.spec import parse

    class LinearOnly(Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            scheme = parse("int8-static")
            acts, weight = annotation(scheme.input), annotation(scheme.weight)
            for node in model.graph.nodes:
                if (kind := kind_of(node)) and kind.name == "Linear":
                    annotate_node(node, {node.args[0]: acts, node.args[1]: weight})
            return model

        def validate(self, model: fx.GraphModule) -> None: ...

and ``qkit.flows.pt2e.convert(model, data, quantizer=LinearOnly())`` takes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from qkit.graph.ao import QuantizationAnnotation, SharedQuantizationSpec
from qkit.graph.ao import Quantizer as Quantizer
from qkit.graph.dialect import Dialect
from qkit.graph.kinds import Kind, activations, bias_of, is_float, kind_of, weight_of
from qkit.graph.observe import PerChannelRange, bias_annotation
from qkit.graph.observe import annotation as annotation
from qkit.graph.sites import Site, find_sites, rule_scheme, when
from qkit.spec import PerChannel, QSpec, Recipe

KEY = "quantization_annotation"


def annotate_node(node: fx.Node, inputs: dict[Any, Any], output: Any = None) -> None:
    """Say how the ``inputs`` of ``node`` are quantized, and its output."""
    node.meta[KEY] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=output, _annotated=True
    )


class RecipeQuantizer(Quantizer):
    """Annotates what ``recipe`` names in the shape of ``dialect``.

    ``observer`` estimates the ranges of activations, a key of :data:`qkit.numerics.OBSERVERS`;
    weights have that of their values. ``watcher`` is as in
    :func:`~qkit.graph.observe.annotation`. After ``annotate``, ``sites`` tells what each layer
    became.
    """

    def __init__(
        self,
        recipe: Recipe,
        dialect: Dialect,
        observer: str = "minmax",
        watcher: type[PerChannelRange] = PerChannelRange,
    ) -> None:
        super().__init__()
        self.recipe, self.dialect, self.observer = recipe, dialect, observer
        self.watcher = watcher
        self.sites: list[Site] = []
        self._made: dict[QSpec, Any] = {}

    def _spec(self, spec: QSpec) -> Any:
        if spec not in self._made:
            observer = "minmax" if spec.when == "weight" else self.observer
            self._made[spec] = annotation(spec, observer, self.watcher)
        return self._made[spec]

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate ``model`` in place."""
        self.sites = find_sites(model, self.recipe, self.dialect)
        layers = _layers(self.sites)
        integer = integer_nodes(model, self.sites, self.recipe, self.dialect)
        sums = self._sums(integer, layers)
        rounded = self._rounded(model, integer, layers, set(sums.values()))
        acts = self._spec(self.dialect.input_spec("static"))
        for node in model.graph.nodes:
            if node in layers:
                self._annotate_layer(layers[node], acts if node in rounded else None)
            elif node in integer:
                self._annotate_other(node, kind_of(node), acts, node in rounded, sums.get(node))
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to refuse: :func:`~qkit.graph.sites.find_sites` did."""

    def _sums(self, integer: set[fx.Node], layers: dict[fx.Node, Site]) -> dict[fx.Node, fx.Node]:
        """The sums of codes that the kernel of one of their terms computes, and that term: the last
        layer among them, so that the other is there."""
        found = {}
        for node in integer:
            kind, terms = kind_of(node), activations(node)
            if kind is None or kind.name != "Add" or not _same_shape(terms):
                continue
            able = [
                term
                for term in terms
                if term in layers
                and layers[term].kind in self.dialect.summing
                and len(term.users) == 1
            ]
            if able:
                found[node] = max(able)
        return found

    def _rounded(
        self,
        model: fx.GraphModule,
        integer: set[fx.Node],
        layers: dict[fx.Node, Site],
        summing: set[fx.Node],
    ) -> set[fx.Node]:
        """The nodes whose output is quantized, because what comes next computes with codes.

        A layer or sum that a lone relu follows is not: the relu's output is. What the dialect has
        no kernel for that takes codes and gives floats (a convolution) always is.
        """
        if not self.dialect.outputs:
            return set()
        rounded: set[fx.Node] = set()
        for node in reversed(list(model.graph.nodes)):
            if node not in integer or node in summing:
                continue
            users = list(node.users)
            kind = kind_of(node)
            assert kind is not None
            if (
                len(users) == 1
                and users[0] in integer
                and _is_tail(users[0])
                and not _is_tail(node)
            ):
                continue
            always = _starts_with(node, self.dialect.always)
            used = any(u in integer and (u in rounded or u in layers or _reads(u)) for u in users)
            if always or used or (kind.role != "weighted" and kind.role != "same"):
                rounded.add(node)
        return rounded

    def _annotate_layer(self, site: Site, output: Any) -> None:
        node, scheme, weight = site.node, site.scheme, weight_of(site.node)
        assert scheme is not None
        assert weight is not None
        inputs = {weight[0]: self._spec(scheme.weight)}
        mode, x = when(scheme), node.all_input_nodes[0]
        if mode != "weight":
            inputs[x] = self._spec(self.dialect.input_spec(mode))
        bias = bias_of(node)
        # A linear layer on more than rows is a product and a sum of its own, in floats.
        rows = site.kind != "Linear" or x.meta["val"].dim() == 2
        if self.dialect.bias and mode == "static" and rows and bias is not None:
            channel = isinstance(scheme.weight.granularity, PerChannel)
            inputs[bias] = bias_annotation((x, node), (weight[0], node), per_channel=channel)
        annotate_node(node, inputs, output)

    def _annotate_other(
        self,
        node: fx.Node,
        kind: Kind | None,
        acts: Any,
        rounded: bool,
        summing: fx.Node | None,
    ) -> None:
        assert kind is not None
        sources = [source for source in activations(node) if source is not summing]
        if kind.role == "tail" and kind_of(sources[0]) and len(sources[0].users) == 1:
            annotate_node(node, {}, acts if rounded else None)
            return
        if not rounded and self.dialect.outputs:
            return
        if kind.role == "alike":
            first = SharedQuantizationSpec((sources[0], node))
            inputs = {source: first for source in sources[1:]} | {sources[0]: acts}
            annotate_node(node, inputs, first)
        elif kind.role == "same":
            if self.dialect.outputs:
                shared = SharedQuantizationSpec((sources[0], node))
                annotate_node(node, {sources[0]: acts}, shared)
        elif kind.role == "binary" or self.dialect.outputs:
            annotate_node(node, {source: acts for source in sources}, acts if rounded else None)


def _layers(sites: Iterable[Site]) -> dict[fx.Node, Site]:
    """The quantized layers but LSTMs, of which targets make their own."""
    return {s.node: s for s in sites if s.scheme is not None and s.kind != "LSTM"}


def integer_nodes(
    model: fx.GraphModule, sites: Iterable[Site], recipe: Recipe, dialect: Dialect
) -> set[fx.Node]:
    """The nodes that can compute with codes: layers with learnt ranges, and what is fed by such
    nodes only."""
    integer = {node for node, site in _layers(sites).items() if site.static}
    for node in model.graph.nodes:
        kind = kind_of(node)
        if kind is None or kind.role == "weighted" or kind.name not in dialect.kinds:
            continue
        sources = activations(node)
        fed = bool(sources) and all(source in integer for source in sources)
        if fed and is_float(node) and rule_scheme(node, kind, recipe)[0] is not None:
            integer.add(node)
    return integer


def _is_tail(node: fx.Node) -> bool:
    kind = kind_of(node)
    return kind is not None and kind.role == "tail"


def _reads(node: fx.Node) -> bool:
    """Whether a node that computes with codes does more than move them."""
    kind = kind_of(node)
    return kind is not None and kind.role in ("binary", "alike", "own")


def _same_shape(nodes: list[fx.Node]) -> bool:
    return len({str(node.meta["val"].shape) for node in nodes}) == 1  # sizes may be symbols


def _starts_with(node: fx.Node, layers: frozenset[str]) -> bool:
    """Whether ``node`` is one of the ``layers``, or the relu behind one."""
    kind = kind_of(node)
    if kind is not None and kind.role == "tail":
        node = node.all_input_nodes[0]
        kind = kind_of(node)
    return kind is not None and kind.name in layers


def name_observers(prepared: fx.GraphModule) -> None:
    """Give qkit's observers in a prepared module the names of what they watch, for messages."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(node.args[0], fx.Node):
            module = prepared.get_submodule(str(node.target))
            if isinstance(module, PerChannelRange):
                source = node.args[0]
                module.observer.name = (
                    str(source.target)
                    if source.op == "get_attr"
                    else f"the output of {source.name}"
                )
