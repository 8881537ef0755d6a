"""Running a captured graph node by node, with the arguments that the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx


class Bound(fx.Interpreter):
    """An interpreter that takes inputs as the model does."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)

    def call(self, args: Any, kwargs: Mapping[str, Tensor]) -> Any:
        """The program's outputs."""
        names = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        free = [name for name in names if name not in kwargs]
        given = dict(zip(free, args, strict=True)) | dict(kwargs)
        return self.run(*(given[name] for name in names))
