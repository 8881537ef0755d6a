"""Rows of one size, for kernels that take one range for all rows at each call.

Where the rows of a linear layer's input differ in size (the tokens of a decoder, each of which
attends to the ones before it), a range for all of them leaves the small ones few codes. So each row
is divided by its greatest magnitude before, and multiplied by it behind:

    y = (x / s) W^T s + b,    s[row] = max |x[row]|

which is what a scale for each row would give, by kernels that have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from qkit.graph.kinds import bias_of

_OPS = torch.ops.aten
# What a row of zeros is divided by.
LEAST = 1e-12


def even_rows(module: fx.GraphModule, layers: Iterable[fx.Node]) -> None:
    """Write the linear ``layers`` of ``module`` in that way; in place."""
    for node in layers:
        _write(module.graph, node)
    module.graph.lint()
    module.recompile()


def _write(graph: fx.Graph, node: fx.Node) -> None:
    x, weight = node.args[:2]
    bias = bias_of(node)
    with graph.inserting_before(node):
        size = _call(graph, node, _OPS.abs.default, x)
        size = _call(graph, node, _OPS.amax.default, size, [-1], True)
        size = _call(graph, node, _OPS.clamp_min.default, size, LEAST)
        even = _call(graph, node, _OPS.div.Tensor, x, size)
    node.args = (even, weight)
    users = list(node.users)
    with graph.inserting_after(node):
        result = _call(graph, node, _OPS.mul.Tensor, node, size)
    if bias is not None:
        with graph.inserting_after(result):
            result = _call(graph, node, _OPS.add.Tensor, result, bias)
    for user in users:
        user.replace_input_with(node, result)


def _call(graph: fx.Graph, like: fx.Node, operator: Any, *args: Any) -> fx.Node:
    """A call of ``operator``, of the module that calls ``like``."""
    made = graph.call_function(operator, args)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    made.meta = dict(like.meta) | {"val": operator(*values)}
    return made
