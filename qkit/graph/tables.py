"""Lookup tables of codes: of a quantized table, only the rows that are looked up become floats.

    embedding(dequantize(codes, scale), ids) = embedding(codes, ids) * embedding(scale, ids)

with one scale for each row, ``[rows, 1]``. torchao's conversion writes the left side, which turns
the whole table into floats at each call, or, where a runtime folds constants, once and for all: the
file is as large as in float then. The right side is plain operators that every runtime has, and
the same numbers bit for bit. Codes that a linear layer multiplies too (a tied head) are one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qkit.graph.kinds import attribute, decomposed

_OPS = torch.ops.aten
LOOKUP = _OPS.embedding.default


def look_up_codes(module: fx.GraphModule) -> fx.GraphModule:
    """A converted program, changed in place: its quantized tables are looked up as codes."""
    for node in list(module.graph.nodes):
        if node.target is LOOKUP and (decomposed(node.args[0]) or "").startswith("dequantize"):
            _replace(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def dense_gradients(module: fx.GraphModule) -> None:
    """Have lookups in a graph that is trained give dense gradients: a sparse one does not pass the
    rounding of the table."""
    for node in module.graph.nodes:
        if node.target is LOOKUP and len(node.args) > 4:
            node.args = (*node.args[:4], False)
    module.recompile()


def _replace(module: fx.GraphModule, node: fx.Node) -> None:
    graph, table, ids = module.graph, node.args[0], node.args[1]
    assert isinstance(table, fx.Node)
    codes: Any = table.args[0]
    scale: Any = table.args[1]
    with graph.inserting_before(node):
        rows = graph.call_function(LOOKUP, (codes, ids))
        rows = graph.call_function(_OPS.to.dtype, (rows, torch.float32))
        if decomposed(table) == "dequantize_per_channel":
            scale = graph.call_function(LOOKUP, (_column(module, scale), ids))
        value = graph.call_function(_OPS.mul.Tensor, (rows, scale))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _column(module: fx.GraphModule, scale: fx.Node) -> fx.Node:
    """The scales of rows as a table of their own."""
    name = f"{str(scale.target).replace('.', '_')}_of_rows"
    if not hasattr(module, name):
        values: Tensor = attribute(module, scale)
        module.register_buffer(name, values.float().reshape(-1, 1).contiguous())
    return module.graph.get_attr(name)
