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


class Simulated(Bound):
    """Runs a captured ``module`` and shows the nodes ``watched`` (names) to ``see``.

    In a prepared module, observers let values through, or, while ``rounding``, round them to the
    numbers that the converted program will have; biases stay floats.
    """

    def __init__(self, module: fx.GraphModule, watched: Collection[str], see: See) -> None:
        super().__init__(module)
        self.watched, self.see, self.rounding = set(watched), see, False

    def forward(self, args: Any, kwargs: Mapping[str, Tensor], *, rounding: bool = False) -> Any:
        """The outputs of the float program, or of the quantized one."""
        self.rounding = rounding
        return self.call(args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As torch does, but for observers."""
        module = self.fetch_attr(target)
        if not isinstance(module, ObserverBase):
            return super().call_module(target, args, kwargs)
        rounds = self.rounding and isinstance(module, PerChannelRange)
        return module.rounded(args[0]) if rounds else args[0]

    def run_node(self, n: fx.Node) -> Any:
        """As torch does, and show what is watched."""
        result = super().run_node(n)
        if n.name in self.watched:
            result = self.see(n, self.fetch_args_kwargs_from_env(n)[0], result)
        return result
