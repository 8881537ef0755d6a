"""Linear layers that are written as products with a parameter, such as transformers' ``Conv1D``.

``addmm(bias, x, w)``, ``mm(x, w)`` and ``matmul(x, w)`` are ``linear(x, w.T, bias)``, which is what
recipes, rows and integer kernels are about.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

_OPS = torch.ops.aten
_PLACES: dict[Any, tuple[int, ...]] = {
    _OPS.addmm.default: (1, 2, 0),
    _OPS.mm.default: (0, 1),
    _OPS.matmul.default: (0, 1),
}


class _Product(NamedTuple):
    """``node`` is ``x @ weight``, and ``bias`` if there is one."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def with_linear(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, changed in place: its parameters that are multiplied from the right are turned,
    where nothing else reads them."""
    readers: dict[str, set[fx.Node]] = defaultdict(set)
    found: dict[str, list[_Product]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] |= set(node.users)
        elif product := _product(node):
            found[str(product.weight.target)].append(product)
    for name, products in found.items():
        if readers[name] == {product.node for product in products} and _turn(module, name):
            for product in products:
                _replace(module.graph, product)
    return module


def _product(node: fx.Node) -> _Product | None:
    """What ``node`` is, if it multiplies by a parameter from the right and does no more."""
    places = _PLACES.get(node.target) if node.op == "call_function" else None
    if places is None or node.kwargs or len(node.args) != len(places):
        return None
    x, weight, *rest = (node.args[place] for place in places)
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return None
    bias = rest[0] if rest else None
    if bias is not None and not (isinstance(bias, fx.Node) and _dims(bias) == 1):
        return None
    if x.op == "get_attr" or _dims(weight) != 2:
        return None
    return _Product(node, x, weight, bias)


def _dims(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _turn(module: fx.GraphModule, name: str) -> bool:
    """Turn the parameter ``name``; False for what is none, or is no float."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    weight = getattr(holder, leaf)
    if not (isinstance(weight, nn.Parameter) and weight.is_floating_point()):
        return False
    setattr(holder, leaf, nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad))
    return True


def _replace(graph: fx.Graph, product: _Product) -> None:
    node, x, weight, bias = product
    with graph.inserting_before(node):
        made = graph.call_function(_OPS.linear.default, (x, weight, *([bias] if bias else [])))
    made.meta = dict(node.meta)
    weight.meta["val"] = weight.meta["val"].t().contiguous()
    node.replace_all_uses_with(made)
    graph.erase_node(node)
