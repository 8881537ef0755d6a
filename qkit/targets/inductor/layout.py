"""Weights laid out in memory as the kernels of oneDNN want them.

Inductor has them laid out while it compiles (its operators ``qconv_prepack``, ``qlinear_prepack``),
for the sizes of the input. Where one of them is dynamic it gives none, and oneDNN takes sizes of
its own making; of ResNet-50, 32 of 53 weights then lie in another order than the kernels want, and
are brought into it again at each call, which takes five times as long as the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

# The operators, and which of their arguments is the shape of the input.
_PREPACKED = {"qconv_prepack": 8, "qlinear_prepack": 1}


@contextmanager
def for_example_sizes() -> Iterator[None]:
    """While it lasts, what Inductor compiles has its weights laid out for the example's sizes."""
    from torch._inductor import freezing

    original = freezing.freezing_passes

    def passes(module: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        original(module, inputs)
        give_sizes(module)

    freezing.freezing_passes = passes
    try:
        yield
    finally:
        freezing.freezing_passes = original


def give_sizes(module: fx.GraphModule) -> int:
    """Tell each prepacking of ``module`` that does not know them the sizes that its input has in
    the example; of how many."""
    told = 0
    for node in module.graph.nodes:
        place = _PREPACKED.get(getattr(node.target, "__name__", "").partition(".")[0])
        if node.op != "call_function" or place is None:
            continue
        sizes = _example_sizes(next(iter(node.users)).args[0])
        if node.args[place] is None and sizes is not None:
            node.update_arg(place, sizes)
            told += 1
    return told


def _example_sizes(x: fx.node.Argument) -> list[int] | None:
    """The sizes of ``x`` in the example; None where they are not known."""
    facts = x.meta.get("tensor_meta") if isinstance(x, fx.Node) else None
    if facts is None:
        return None
    sizes = [size if isinstance(size, int) else size.node.hint for size in facts.shape]
    return None if None in sizes else [int(size) for size in sizes]
