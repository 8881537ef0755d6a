"""Multiply-adds of a model, counted by torch's own counter with qkit's operators added to it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qkit import ops
from qkit.flows.evaluate import eval_mode, for_dtype
from qkit.models import Inputs, run

Shape = tuple[int, ...]


def multiply_adds(model: nn.Module, inputs: Inputs) -> int:
    """Those of matrix products, convolutions and attention in one call of ``model``.

    What only adds, norms and activations are not counted, as is usual.
    """
    return _counted(model, inputs).get_total_flops() // 2


def multiply_adds_by_module(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """:func:`multiply_adds` of each module by its name, of all its calls; those with any."""
    root = type(model).__name__
    counts = _counted(model, inputs).get_flop_counts().items()
    return {
        name.removeprefix(root).removeprefix("."): sum(each.values()) // 2
        for name, each in counts
        if name == root or name.startswith(f"{root}.")
    }


def _counted(model: nn.Module, inputs: Inputs) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_OURS)
    with counter, eval_mode(model):
        run(model, for_dtype(inputs, model))
    return counter


def _product(x: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    """A linear operator: each output is a product with the last dimension of ``x``."""
    return 2 * math.prod(out_shape) * x[-1]


def _convolution(x: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    """Each place of the output (of the input, if transposed) meets the kernel in each channel."""
    kernel, _, _, _, groups, transposed, _ = args[-7:]
    channels, places = (out_shape, x) if transposed else (x, out_shape)
    return 2 * math.prod(places) * channels[1] // groups * math.prod(kernel)


_LINEAR = (ops.linear, ops.linear_codebook, ops.linear_dynamic, ops.linear_static)
_OURS: dict[Any, Any] = {op.overloadpacket: _product for op in _LINEAR}
_OURS[ops.convolution.overloadpacket] = _convolution


def parameters(model: nn.Module) -> int:
    """The parameters of ``model``, shared ones once."""
    return sum(p.numel() for p in model.parameters())
