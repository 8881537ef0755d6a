"""The operators of qkit as ``torch.ops.qkit.*``: schema, fake, implementation, gradient.

They work in eager mode, under ``torch.compile`` and in ``torch.export`` programs. Importing this
package registers them; a saved program that uses them needs that import before it is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from qkit.native import isa
from qkit.ops import native, reference, schema

_counters: list[Counter[str]] = []


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Count which implementations really run inside the block.

    Yields a counter of names such as ``qkit::linear[avx512]``: the operator, and the instruction
    set of the kernels or ``reference``.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: two counters with equal counts are equal.
        _counters[:] = [other for other in _counters if other is not counter]


def _implementation(name: str) -> Callable[..., Tensor]:
    """The kernels' implementation where there is one and it applies, and the reference's."""
    plain, fast = reference.IMPLEMENTATIONS[name], native.IMPLEMENTATIONS.get(name)

    @wraps(plain)
    def call(*args: Any) -> Tensor:
        out = None if fast is None else fast(*args)
        ran = "reference" if out is None else isa()
        for counter in _counters:
            counter[f"qkit::{name}[{ran}]"] += 1
        return plain(*args) if out is None else out

    return call


def _save_for_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, zero_point, bias, bits, group = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.call = (bits, group, x.shape[-1], x.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; the quantized weight has none."""
    weight, scale, zero_point = ctx.saved_tensors
    bits, group, columns, dtype = ctx.call
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.qkit.dequantize(
            weight, scale, zero_point, bits, group, columns, dtype
        )
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


def _save_for_conv2d(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, zero_point, bias, bits, group, kernel, *geometry = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.call = (bits, group, kernel, geometry, x.shape, x.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; the quantized weight has none."""
    weight, scale, zero_point = ctx.saved_tensors
    bits, group, kernel, (stride, padding, dilation, groups), shape, dtype = ctx.call
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        channels = shape[-3] // groups
        columns = channels * kernel[0] * kernel[1]
        rows = torch.ops.qkit.dequantize(weight, scale, zero_point, bits, group, columns, dtype)
        weight = rows.reshape(-1, channels, *kernel)
        batched = (1, *shape) if len(shape) == 3 else shape
        grad_x = conv2d_input(
            batched, weight, grad.reshape(-1, *grad.shape[-3:]), stride, padding, dilation, groups
        ).reshape(shape)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, *grad.shape[-3:]).sum((0, 2, 3)).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *(None,) * 7)


_library = torch.library.Library("qkit", "DEF")
for _name, _schema in schema.SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkit::{_name}", schema.FAKES[_name], lib=_library)
torch.library.register_autograd(
    "qkit::linear", _linear_backward, setup_context=_save_for_linear, lib=_library
)
torch.library.register_autograd(
    "qkit::conv2d", _conv2d_backward, setup_context=_save_for_conv2d, lib=_library
)

linear = torch.ops.qkit.linear.default
conv2d = torch.ops.qkit.conv2d.default
dequantize = torch.ops.qkit.dequantize.default
