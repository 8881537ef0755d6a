"""The operators on the compiled kernels, where they apply; everything else is the reference's.

They apply to tensors on the CPU and to inputs of fp32, bf16 and fp16; fp64 keeps its precision in
the reference. The weight is used as it is stored: nothing is repacked or kept.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qkit import native
from qkit.packing import packed_words
from qkit.spec.granularity import ceil_div

# What the kernels compute with, as fp32; fp64 would lose precision.
NARROW = (torch.float32, torch.bfloat16, torch.float16)

Stored = tuple[Tensor, Tensor, Tensor | None]  # weight, scale, zero point, ready for the kernels


def _stored(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Stored | None:
    """The three tensors as the kernels read them; None if they do not, or if anything is amiss.

    Everything is checked here, because the kernels check nothing; the reference says what is wrong.
    """
    rows = weight.shape[0]
    width = columns if bits == 8 else packed_words(columns, bits)
    shared = tuple(scale.shape) == (1, 1) and group == 0
    blocks = ceil_div(columns, group) if group else 1
    tensors = (weight, scale) if zero_point is None else (weight, scale, zero_point)
    if (
        rows * columns == 0
        or not 1 <= bits <= 8
        or group < 0
        or math.prod(weight.shape[1:]) != width
        or (bits < 8 and weight.ndim != 2)
        or any(t.device.type != "cpu" for t in tensors)
        or weight.dtype != (torch.int8 if bits == 8 else torch.int32)
        or scale.dtype not in NARROW
        or not (shared or tuple(scale.shape) == (rows, blocks))
        or (zero_point is not None and zero_point.dtype != torch.int8)
        or (zero_point is not None and zero_point.shape != scale.shape)
    ):
        return None
    zero = None if zero_point is None else zero_point.contiguous()
    return weight.contiguous(), scale.to(torch.float32).contiguous(), zero


def _arguments(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, columns: int
) -> tuple:
    """What ``_stored`` found, as the C functions take it; the tensors must outlive the call."""
    rows = weight.shape[0]
    stride = weight.numel() * weight.element_size() // rows
    zero = None if zero_point is None else zero_point.data_ptr()
    shared = int(scale.shape[0] != rows)
    return weight.data_ptr(), rows, columns, stride, bits, group, scale.data_ptr(), zero, shared


def _decode(
    kernels: ctypes.CDLL,
    stored: Stored,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    out = torch.empty(stored[0].shape[0], columns)
    threads = torch.get_num_threads()
    kernels.qkit_decode(*_arguments(*stored, bits, group, columns), out.data_ptr(), threads)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor | None:
    """``qkit::linear``; None where the reference has to do it (or to refuse it)."""
    kernels = native.library()
    if kernels is None or x.dtype not in NARROW or x.device.type != "cpu" or x.ndim == 0:
        return None
    columns = x.shape[-1]
    stored = _stored(weight, scale, zero_point, bits, group, columns)
    if stored is None or not (bias is None or _is_bias(bias, weight.shape[0])):
        return None
    rows, outputs = math.prod(x.shape[:-1]), weight.shape[0]
    wide = x.reshape(rows, columns).to(torch.float32).contiguous()
    wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = torch.empty(rows, outputs)
    scratch = torch.empty(kernels.qkit_linear_scratch(rows, columns))
    # At any number of rows: torch's product of a decoded tile is no faster (0.88 against 0.87 of
    # fp32 at 512 rows of 4096 x 4096), and not the same bits in every process.
    kernels.qkit_linear(
        wide.data_ptr(),
        rows,
        *_arguments(*stored, bits, group, columns),
        None if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], outputs)


def _is_bias(bias: Tensor, outputs: int) -> bool:
    # One of fp64 is added in fp64, by the reference.
    return bias.device.type == "cpu" and bias.dtype in NARROW and tuple(bias.shape) == (outputs,)


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """``qkit::dequantize``; None where the reference has to do it (or to refuse it)."""
    kernels = native.library()
    if kernels is None or dtype not in NARROW:
        return None
    stored = _stored(weight, scale, zero_point, bits, group, columns)
    return None if stored is None else _decode(kernels, stored, bits, group, columns).to(dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor | None]] = {
    "linear": linear,
    "dequantize": dequantize,
}
