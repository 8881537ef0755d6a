"""Batch-norms that may not be folded into the layer before them.

torchao folds a batch-norm into the convolution or linear layer whose output it takes, and does not
look who else takes that output or shares that weight: what a dense block carries past the norm is
normalised too then, and behind a convolution that is used twice a norm is lost. There
:func:`spell_out` writes the norm as the product and the sum that it is in eval mode, so that there
is nothing to fold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qkit.graph.kinds import attribute

_NORM = torch.ops.aten.batch_norm.default
_LAYERS = ("aten::conv", "aten::linear")


def spell_out(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with each batch-norm that cannot be folded as ``x * scale + shift``; in place."""
    graph = module.graph
    for index, norm in enumerate([n for n in graph.nodes if n.target is _NORM]):
        layer = norm.args[0]
        if not _is_layer(layer) or _may_fold(layer, norm):
            continue
        scale, shift = _affine(module, norm)
        with graph.inserting_before(norm):
            value = layer
            operators = (torch.ops.aten.mul.Tensor, scale), (torch.ops.aten.add.Tensor, shift)
            for operator, tensor in operators:
                name = f"_batch_norm_{index}_{operator.__name__.partition('.')[0]}"
                module.register_buffer(name, tensor)
                constant = graph.get_attr(name)
                constant.meta["val"] = tensor
                value = graph.call_function(operator, (value, constant))
                value.meta = dict(norm.meta)
        norm.replace_all_uses_with(value)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _is_layer(node: Any) -> bool:
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema is not None and schema.name.startswith(_LAYERS)


def _may_fold(layer: fx.Node, norm: fx.Node) -> bool:
    """Whether nobody but ``norm`` takes the output of ``layer``, and nobody shares its weight."""
    weight = layer.args[1]
    if list(layer.users) != [norm] or not isinstance(weight, fx.Node):
        return False
    same = [n for n in layer.graph.nodes if n.op == "get_attr" and n.target == weight.target]
    return sum(len(node.users) for node in same) == 1


def _affine(module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``norm``, in the shape of a value's channels; computed in fp64."""
    given: Any = norm.args[1:5]
    weight, bias, mean, var = (e if e is None else attribute(module, e).double() for e in given)
    assert mean is not None
    assert var is not None
    scale = (var + float(norm.args[7])).rsqrt()  # type: ignore[arg-type]
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (norm.meta["val"].dim() - 2))
    return scale.reshape(shape).float(), shift.reshape(shape).float()
