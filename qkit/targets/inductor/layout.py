"""Weights laid out in memory as the kernels of oneDNN want them.

Inductor has them laid out while it compiles, for the sizes of the input, if those are constants.
Where one is dynamic, it gives integer kernels no sizes, and oneDNN takes some of its own making: of
ResNet-50, 32 of 53 weights then lie in another order than the kernels want, and are brought into it
at each call, which takes five times as long as the model itself. Weights of convolutions in float
it leaves as they are, to be laid out at each call, all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import fx

# Operators that lay out a weight, and which of their arguments is the shape of the input.
_PREPACKED = {"qconv_prepack": 8, "qlinear_prepack": 1}


@contextmanager
def for_example_sizes() -> Iterator[None]:
    """While it lasts, what Inductor compiles has its weights laid out for the example's sizes."""
    freezing: Any = import_module("torch._inductor.freezing")
    original = freezing.freezing_passes

    def passes(module: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        original(module, inputs)
        give_sizes(module)
        lay_out_floats(module)

    freezing.freezing_passes = passes
    try:
        yield
    finally:
        freezing.freezing_passes = original


def give_sizes(module: fx.GraphModule) -> None:
    """Tell each prepacking of ``module`` that does not know them the sizes that its input has in
    the example."""
    for node in module.graph.nodes:
        place = _PREPACKED.get(getattr(node.target, "__name__", "").partition(".")[0])
        if node.op != "call_function" or place is None:
            continue
        sizes = _example_sizes(next(iter(node.users)).args[0])
        if node.args[place] is None and sizes is not None:
            node.update_arg(place, sizes)


def lay_out_floats(module: fx.GraphModule) -> None:
    """Have the constant weights of convolutions in float laid out for the example's sizes."""
    lay_out = torch.ops.mkldnn._reorder_convolution_weight.default
    for node in module.graph.nodes:
        if node.target is not torch.ops.mkldnn._convolution_pointwise.default:
            continue
        x, weight, _, *geometry = node.args[:7]  # padding, stride, dilation, groups
        sizes = _example_sizes(x)
        if weight.op == "get_attr" and sizes is not None:
            with module.graph.inserting_before(node):
                laid_out = module.graph.call_function(lay_out, (weight, *geometry, sizes))
            node.update_arg(1, laid_out)


def _example_sizes(x: Any) -> list[int] | None:
    """The sizes of ``x`` in the example; None where they are not known."""
    value = x.meta.get("val", x.meta.get("tensor_meta")) if isinstance(x, fx.Node) else None
    if value is None:
        return None
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return None if None in sizes else [int(size) for size in sizes]
