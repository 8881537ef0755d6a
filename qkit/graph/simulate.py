"""Running a captured graph node by node: as it is, or, prepared, as its conversion will compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx

from qkit.graph.ao import ObserverBase
from qkit.graph.bound import Bound
from qkit.graph.observe import PerChannelRange

# Given a node, its arguments as values, and its value: the value to go on with.
See = Callable[[fx.Node, tuple[Any, ...], Any], Any]


class _Rounding(Bound):
    """Observers let values through, or, while ``rounding``, round them to the numbers that the
    converted program will have; biases stay floats."""

    rounding = False

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As torch does, but for observers."""
        module = self.fetch_attr(target)
        if not isinstance(module, ObserverBase):
            return super().call_module(target, args, kwargs)
        rounds = self.rounding and isinstance(module, PerChannelRange)
        return module.rounded(args[0]) if rounds else args[0]


class Simulated(_Rounding):
    """Runs a captured ``module`` and shows the nodes ``watched`` (names) to ``see``.

    A prepared one is run as :class:`_Rounding` says.
    """

    def __init__(self, module: fx.GraphModule, watched: Collection[str], see: See) -> None:
        super().__init__(module)
        self.watched, self.see = set(watched), see

    def forward(self, args: Any, kwargs: Mapping[str, Tensor], *, rounding: bool = False) -> Any:
        """The outputs of the float program, or of the quantized one."""
        self.rounding = rounding
        return self.call(args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """As torch does, and show what is watched."""
        result = super().run_node(n)
        if n.name in self.watched:
            result = self.see(n, self.fetch_args_kwargs_from_env(n)[0], result)
        return result


class Beside(_Rounding):
    """Runs a prepared module as it is and as its conversion will compute, node by node.

    At the nodes ``watched``, ``fit`` is given the node, its arguments in the rounded program and
    its value in the exact one; what it returns is the value in the rounded program.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        watched: Collection[fx.Node],
        fit: See,
    ) -> None:
        super().__init__(module)
        self.watched, self.fit = set(watched), fit

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The arguments of ``n`` in the program that is being computed."""
        return fx.node.map_arg(args, lambda node: self.env[node][self.rounding])

    def run_node(self, n: fx.Node) -> Any:
        """The values of ``n`` in both programs; of the output, those of the rounded one."""
        if n.op == "placeholder":
            value = super().run_node(n)
            return value, value
        self.rounding = False
        exact = super().run_node(n)
        self.rounding = True
        if n in self.watched:
            return exact, self.fit(n, self.fetch_args_kwargs_from_env(n)[0], exact)
        rounded = super().run_node(n)
        return rounded if n.op == "output" else (exact, rounded)
