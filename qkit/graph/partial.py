"""Running a converted program with some layers rounded and the others in float.

In a converted program whose weights are not folded yet, an edge is rounded where a quantize and a
dequantize operator stand on it. :class:`Partial` lets the value through unchanged unless a layer at
one of its ends is ``active``: of layers alone, inputs, weights and outputs are rounded then, and so
is what only active layers feed (sums, pools), as the annotations of a recipe with these layers
would have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx

from qkit.graph.bound import Bound
from qkit.graph.kinds import decomposed, kind_of


class Partial(Bound):
    """Runs ``module`` with the ``layers`` (name -> the name of its node) that are ``active``.

    ``outputs`` holds the output of each layer of the last run.
    """

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(module)
        self.layers = {node: name for name, node in layers.items()}
        self.outputs: dict[str, Tensor] = {}
        self.active: Collection[str] = ()
        self._on: dict[fx.Node, bool] = {}

    def forward(self, active: Collection[str], args: Any, kwargs: Mapping[str, Tensor]) -> Any:
        """The program's outputs with only the layers ``active`` rounded."""
        self.active, self.outputs, self._on = active, {}, {}
        for node in self.graph.nodes:
            self._on[node] = self._is_on(node)
        return self.call(args, kwargs)

    def _is_on(self, node: fx.Node) -> bool:
        """Whether an operator computes with codes: an active layer, or fed by such ones only."""
        if node.name in self.layers:
            return self.layers[node.name] in self.active
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if not sources:
            return False
        kind = kind_of(node)
        if decomposed(node) is not None or (kind is not None and kind.role == "tail"):
            return self._on[sources[0]]
        return all(_is_dequantize(source) and self._on[source] for source in sources)

    def run_node(self, n: fx.Node) -> Any:
        """As torch does, but values pass through quantize operators, and are rounded behind."""
        if (decomposed(n) or "").startswith("quantize"):
            return self.fetch_args_kwargs_from_env(n)[0][0]
        if _is_dequantize(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x, params = args[0], args[1:]
            if self._on[n] or any(self._on[user] for user in n.users):
                # Both operators have the same parameters at the same places.
                quantize: Any = n.all_input_nodes[0].target
                x = self.call_function(n.target, (quantize(x, *params), *params), kwargs)
            return x
        result = super().run_node(n)
        if n.name in self.layers:
            self.outputs[self.layers[n.name]] = result
        return result


def _is_dequantize(node: fx.Node) -> bool:
    return (decomposed(node) or "").startswith("dequantize")
