"""Convolutions of any number of dimensions, forward and transposed, as operators.

At each call the weight is dequantized and given to torch's own convolution, unless there are so
few outputs that :mod:`qkit.ops.products` is faster. The native kernels dequantize into memory that
is kept for the next call, at most :data:`SCRATCH_VALUES` values for each thread that calls.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkit import native as library
from qkit.ops import native
from qkit.ops.products import product
from qkit.ops.reference import rows_of, tiles, work_dtype
from qkit.ops.schema import check_float, check_weight
from qkit.packing.store import turn

# Values of a weight that the kernels dequantize at a time: 16 MiB of fp32.
SCRATCH_VALUES = 1 << 22

_kept = threading.local()


def convolve(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
) -> Tensor:
    """torch's convolution by the float weight ``rows`` ``[out, in / groups, *kernel]``."""
    batched = x.dim() == rows.dim()
    y = torch.convolution(
        x if batched else x.unsqueeze(0),
        turn(rows, groups) if transposed else rows,
        *(bias, stride, padding, dilation, transposed, output_padding, groups),
    )
    return y if batched else y.squeeze(0)


def _columns(x: Tensor, kernel: list[int], groups: int) -> int:
    """Values of the weight for one output channel."""
    n = len(kernel)
    torch._check(
        x.dim() in (n + 1, n + 2),
        lambda: f"qkit::convolution: x must have {n + 1} or {n + 2} dimensions, got {x.dim()}",
    )
    return x.shape[-1 - n] // groups * math.prod(kernel)


def convolution_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    *geometry: Any,
) -> Tensor:
    """Shape, dtype and memory format of ``convolution``: those of torch's own."""
    check_float(x, "convolution")
    columns = _columns(x, kernel, geometry[3])
    check_weight("convolution", weight, scale, columns, bits, group)
    rows = x.new_empty((weight.shape[0], columns // math.prod(kernel), *kernel))
    return convolve(x, rows, None, *geometry)


def convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    *geometry: Any,
) -> Tensor:
    """torch's convolution of ``x`` with the dequantized weight, in plain torch.

    ``geometry`` is stride, padding, dilation, groups, transposed and output padding.
    """
    check_float(x, "convolution")
    columns, groups = _columns(x, kernel, geometry[3]), geometry[3]
    check_weight("convolution", weight, scale, columns, bits, group)
    stored = weight, scale, zero_point, bits, group, columns, work_dtype(x)
    # A grouped convolution cannot be cut by rows, and its weight is small.
    pieces = tiles(*stored) if groups == 1 else [(slice(None), rows_of(*stored))]
    return _by_pieces(x, pieces, bias, kernel, geometry)


def _by_pieces(
    x: Tensor,
    pieces: Iterable[tuple[slice, Tensor]],
    bias: Tensor | None,
    kernel: list[int],
    geometry: tuple[Any, ...],
) -> Tensor:
    """The output channels of one piece of the weight after the other, in the dtype of ``x``."""
    wide, channels = x.to(work_dtype(x)), x.shape[-1 - len(kernel)] // geometry[3]
    bias = None if bias is None else bias.to(wide.dtype)
    outputs = [
        convolve(
            wide,
            rows.view(-1, channels, *kernel),
            None if bias is None else bias[part],
            *geometry,
        )
        for part, rows in pieces
    ]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1 - len(kernel))
    return y.to(x.dtype)


def convolution_native(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    *geometry: Any,
) -> Tensor | None:
    """``convolution`` with the kernels; None where plain torch has to do it (or to refuse it)."""
    if x.dtype not in native.TYPES or x.device.type != "cpu":
        return None
    kernels, columns = library.library(), _columns(x, kernel, geometry[3])
    stored = native.stored(weight, scale, zero_point, None, bits, group, columns)
    if stored is None or kernels is None:
        return None
    return run(kernels, stored, x, bias, kernel, geometry)


def run(
    kernels: ctypes.CDLL,
    stored: native.Stored,
    x: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    geometry: tuple[Any, ...],
) -> Tensor:
    """The convolution of ``x``, which is of ``native.TYPES`` and on the CPU."""
    done = product(kernels, stored, x, bias, kernel, geometry)
    if done is not None:
        return done
    groups = geometry[3]
    if groups == 1 and stored.rows * stored.columns > SCRATCH_VALUES:
        return _by_pieces(x, _decoded(kernels, stored), bias, kernel, geometry)
    # As _by_pieces does with one piece, with nothing that a small layer would feel.
    rows = _scratch(stored.rows, x.shape[-1 - len(kernel)] // groups, *kernel)
    native.decode(kernels, stored, None, rows)
    if x.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32):
        return convolve(x, rows, bias, *geometry)
    bias = None if bias is None else bias.float()
    return convolve(x.float(), rows, bias, *geometry).to(x.dtype)


def _decoded(kernels: ctypes.CDLL, stored: native.Stored) -> Iterator[tuple[slice, Tensor]]:
    """The float weight in pieces of rows, each valid until the next one is asked for."""
    rows, step = stored.rows, max(1, SCRATCH_VALUES // stored.columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out = _scratch(part.stop - start, stored.columns)
        yield part, native.decode(kernels, stored, torch.arange(start, part.stop), out)


def _scratch(*shape: int) -> Tensor:
    """Memory for fp32 values of ``shape``, the same at each call of a thread.

    New memory would cost more than to dequantize into it: its pages must be made and cleared.
    """
    known: dict[tuple[int, ...], Tensor] | None = getattr(_kept, "views", None)
    if known is not None and shape in known:
        return known[shape]
    values = math.prod(shape)
    if values > SCRATCH_VALUES:
        return torch.empty(shape)
    memory: Tensor | None = getattr(_kept, "memory", None)
    with torch.inference_mode(False):  # what is made in this mode is of no use outside it
        if memory is None or known is None or memory.numel() < values:
            memory, known = torch.empty(values), {}
            _kept.memory, _kept.views = memory, known
        known[shape] = memory[:values].view(shape)
    return known[shape]


def save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """What the gradient needs: the stored weight, not what it is dequantized to."""
    x, weight, scale, zero_point, bias, bits, group, kernel, *geometry = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.call = (bits, group, kernel, geometry, x.shape, x.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; the quantized weight has none."""
    weight, scale, zero_point = ctx.saved_tensors
    bits, group, kernel, geometry, shape, dtype = ctx.call
    # conv2d has neither of the last two.
    stride, padding, dilation, groups, transposed, output_padding = [*geometry, False, [0, 0]][:6]
    n = len(kernel)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        channels = shape[-1 - n] // groups
        columns = channels * math.prod(kernel)
        rows = torch.ops.qkit.dequantize(weight, scale, zero_point, bits, group, columns, dtype)
        rows = rows.reshape(-1, channels, *kernel)
        batched = (1, *shape) if len(shape) == n + 1 else shape
        grad_x = torch.ops.aten.convolution_backward(
            grad.reshape(-1, *grad.shape[-1 - n :]),
            grad.new_empty(1).expand(batched),  # of which only the shape is read
            turn(rows, groups) if transposed else rows,
            None,
            *(stride, padding, dilation, transposed, output_padding, groups),
            (True, False, False),
        )[0].reshape(shape)
    if ctx.needs_input_grad[4]:
        summed = [0, *range(2, n + 2)]
        grad_bias = grad.reshape(-1, *grad.shape[-1 - n :]).sum(summed).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *(None,) * (len(ctx.needs_input_grad) - 5))


# ``conv2d`` is what the programs of older artifacts call.


def conv2d_fake(*args: Any) -> Tensor:
    """Shape, dtype and memory format of ``conv2d``."""
    return convolution_fake(*args, False, [0, 0])


def conv2d(*args: Any) -> Tensor:
    """``convolution`` of two dimensions, forward, in plain torch."""
    return convolution(*args, False, [0, 0])


def conv2d_native(*args: Any) -> Tensor | None:
    """``conv2d`` with the kernels; None where plain torch has to do it (or to refuse it)."""
    return convolution_native(*args, False, [0, 0])


FAKES = {"convolution": convolution_fake, "conv2d": conv2d_fake}
IMPLEMENTATIONS = {"convolution": convolution, "conv2d": conv2d}
NATIVE = {"convolution": convolution_native, "conv2d": conv2d_native}
