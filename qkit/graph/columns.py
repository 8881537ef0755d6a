"""Columns of one size, for kernels that give codes of one range for all of them.

Such a kernel rounds the output of a linear layer too, where others give floats. Columns that differ
in size, as channels of a trained transformer do, then leave the small ones few codes. So the rows
of the weight, and the bias, are divided by what the columns reach, and the columns multiplied by it
behind the rounding:

    y = s (x (W / s)^T + b / s),    s[column] = max |y[column]| of the calibration data

The codes of a weight with a scale for each row are the same, and the float program computes what it
did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from qkit.graph.kinds import attribute, bias_of, weight_of
from qkit.graph.norms import put


def even_columns(module: fx.GraphModule, sizes: Mapping[fx.Node, Tensor]) -> None:
    """Write the linear layers of ``module`` that ``sizes`` names in that way; in place.

    Nothing else may read their parameters.
    """
    for node, size in sizes.items():
        size = torch.where(size > 0, size, torch.ones_like(size))
        weight, bias = weight_of(node), bias_of(node)
        assert weight is not None
        for each, shape in ((weight[0], (-1, 1)), (bias, (-1,))):
            if each is not None:
                tensor = attribute(module, each) / size.reshape(shape)
                put(module, str(each.target), nn.Parameter(tensor, requires_grad=False))
        times(module, node, size, list(node.users))
    module.graph.lint()
    module.recompile()


def times(
    module: fx.GraphModule, node: fx.Node, factor: Tensor, readers: Iterable[fx.Node]
) -> None:
    """Have ``readers`` take the value of ``node`` times a constant, one ``factor`` for each place
    along its last dimension."""
    name, graph = f"_factor_of_{node.name}", module.graph
    while hasattr(module, name):  # its value may be multiplied more than once
        name += "_"
    module.register_buffer(name, factor)
    with graph.inserting_after(node):
        constant = graph.get_attr(name)
    constant.meta["val"] = factor
    with graph.inserting_after(constant):
        made = graph.call_function(torch.ops.aten.mul.Tensor, (node, constant))
    made.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, made)
