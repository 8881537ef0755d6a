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

from qkit.native import isa
from qkit.ops import convolutions, eager, native, reference, schema
from qkit.spec import Int


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Count which implementations really run inside the block.

    Yields a counter of names such as ``qkit::linear[avx512]``: the operator, and the instruction
    set of the kernels or ``reference``.
    """
    counter: Counter[str] = Counter()
    eager.counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: two counters with equal counts are equal.
        eager.counters[:] = [other for other in eager.counters if other is not counter]


def _implementation(name: str) -> Callable[..., Tensor]:
    """The kernels' implementation where there is one and it applies, and the reference's."""
    plain, fast = _PLAIN[name], _FAST.get(name)

    @wraps(plain)
    def call(*args: Any) -> Tensor:
        out = None if fast is None else fast(*args)
        eager.count(name, None if out is None else isa())
        return plain(*args) if out is None else out

    return call


def _save_for_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    # `third` is the zero point, or the levels of a codebook.
    x, weight, scale, third, bias, bits, group, *acts = inputs
    ctx.save_for_backward(weight, scale, third, *_kept(x, acts))
    ctx.call = (bits, group, x.shape[-1], x.dtype, acts[:1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _kept(x: Tensor, acts: list) -> tuple[Tensor, ...]:
    """What the gradient of a static layer needs: the input, to see what was clipped."""
    return (x, *acts[1:]) if acts and isinstance(acts[1], Tensor) else ()


def _backward(dequantize: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients of the input and the bias; the quantized weight has none.

    Rounded activations pass their gradient on as it is (straight through), except where a static
    range clipped them.
    """

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, third, *static = ctx.saved_tensors
        bits, group, columns, dtype, act_bits = ctx.call
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(weight, scale, third, bits, group, columns, dtype)
            if static:
                x, act_scale, act_zero_point = static
                inside = _inside(x, act_scale, act_zero_point, act_bits[0])
                grad_x = grad_x * inside.to(grad_x.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, *(None,) * (len(ctx.needs_input_grad) - 5)

    return backward


def _inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Where a static range does not clip ``x``."""
    fmt = Int(bits, narrow=zero_point is None)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # as the forward pass
    codes = (x.to(wide) / scale).round() + (0 if zero_point is None else zero_point)
    return (codes >= fmt.qmin) & (codes <= fmt.qmax)


_FAKES = schema.FAKES | convolutions.FAKES
_PLAIN = reference.IMPLEMENTATIONS | convolutions.IMPLEMENTATIONS
_FAST = native.IMPLEMENTATIONS | convolutions.NATIVE
_library = torch.library.Library("qkit", "DEF")
for _name, _schema in schema.SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkit::{_name}", _FAKES[_name], lib=_library)
_OF_INTEGERS = _backward(torch.ops.qkit.dequantize)
_OF_LEVELS = _backward(torch.ops.qkit.dequantize_codebook)
for _name, _gradient in {
    "linear": _OF_INTEGERS,
    "linear_codebook": _OF_LEVELS,
    "linear_dynamic": _OF_INTEGERS,
    "linear_static": _OF_INTEGERS,
}.items():
    torch.library.register_autograd(
        f"qkit::{_name}", _gradient, setup_context=_save_for_linear, lib=_library
    )
for _name in convolutions.IMPLEMENTATIONS:
    torch.library.register_autograd(
        f"qkit::{_name}",
        convolutions.backward,
        setup_context=convolutions.save_for_backward,
        lib=_library,
    )

linear = torch.ops.qkit.linear.default
linear_codebook = torch.ops.qkit.linear_codebook.default
linear_dynamic = torch.ops.qkit.linear_dynamic.default
linear_static = torch.ops.qkit.linear_static.default
convolution = torch.ops.qkit.convolution.default
conv2d = torch.ops.qkit.conv2d.default
dequantize = torch.ops.qkit.dequantize.default
dequantize_codebook = torch.ops.qkit.dequantize_codebook.default
embedding = torch.ops.qkit.embedding.default
