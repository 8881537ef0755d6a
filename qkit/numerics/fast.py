"""The native kernels for the common case: blocks that are runs of a contiguous fp32 tensor.

A block shape of ``(1, ..., 1, b, full, ..., full)`` (per tensor, per channel of the first axes,
per group, per token) cuts a contiguous tensor into runs. Everything else, and every tensor that is
not on the CPU, takes the torch path of :mod:`qkit.numerics.affine`; both give the same bits.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from qkit import native

Shape = tuple[int, ...]
# Below this a call of torch costs no more than finding out that there are kernels.
MIN_VALUES = 1 << 10
# Of shorter runs, torch's own reductions find the range as fast.
MIN_RUN = 1 << 5


def _runs(shape: Shape, block_shape: Shape) -> tuple[int, int, int] | None:
    """``(rows, columns, block)``: the tensor as a matrix whose blocks are runs of its rows."""
    axis = next((i for i, b in enumerate(block_shape) if b != 1), len(shape) - 1)
    if block_shape[axis + 1 :] != shape[axis + 1 :]:
        return None
    inner = math.prod(shape[axis + 1 :])
    return math.prod(shape[:axis]), shape[axis] * inner, block_shape[axis] * inner


def _kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if it can read these tensors where they are."""
    plain = all(
        type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous() and not t.requires_grad
        for t in tensors
    )
    if not plain or tensors[0].numel() < MIN_VALUES or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.maybe_current_level() is not None:  # inside vmap, grad and the like
        return None
    return native.library()


def block_range(x: Tensor, block_shape: Shape) -> tuple[Tensor, Tensor] | None:
    """:func:`qkit.numerics.blocks.block_range` by the kernels; None where they cannot."""
    runs = _runs(tuple(x.shape), block_shape) if x.dtype == torch.float32 and x.ndim else None
    kernels = _kernels(x) if runs and runs[2] >= MIN_RUN and runs[0] > 1 else None
    if kernels is None or runs is None:
        return None
    rows, columns, block = runs
    count = [-(-n // b) for n, b in zip(x.shape, block_shape, strict=True)]
    lo, hi = torch.empty(count), torch.empty(count)
    threads = torch.get_num_threads()
    kernels.qkit_range(x.data_ptr(), rows, columns, block, lo.data_ptr(), hi.data_ptr(), threads)
    return lo, hi


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_shape: Shape,
    qmin: int,
    qmax: int,
    out: Tensor | None = None,
) -> Tensor | None:
    """int8 codes of ``x`` by the kernels; None where they cannot."""
    runs = _runs(tuple(x.shape), block_shape) if x.dtype == torch.float32 and x.ndim else None
    if runs is None or (zero_point is not None and zero_point.dtype != torch.int8):
        return None
    scale, zero_point, runs = _spread(scale.float(), zero_point, runs)
    kernels = _kernels(*(t for t in (x, scale, zero_point, out) if t is not None))
    if kernels is None:
        return None
    codes = torch.empty(x.shape, dtype=torch.int8) if out is None else out
    kernels.qkit_quantize(
        x.data_ptr(),
        *runs,
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        qmin,
        qmax,
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes


def quantize_minmax(
    x: Tensor, block_shape: Shape, qmin: int, qmax: int, affine: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes, fp32 scales and (affine) zero points of ``x`` in one pass over it.

    None where the kernels cannot, and where a value or a range is not finite.
    """
    runs = _runs(tuple(x.shape), block_shape) if x.dtype == torch.float32 and x.ndim else None
    kernels = _kernels(*(t for t in (x, out) if t is not None)) if runs and runs[0] > 1 else None
    if kernels is None or runs is None:
        return None
    count = [-(-n // b) for n, b in zip(x.shape, block_shape, strict=True)]
    codes = torch.empty(x.shape, dtype=torch.int8) if out is None else out
    scale = torch.empty(count)
    zero_point = torch.empty(count, dtype=torch.int8) if affine else None
    good = kernels.qkit_quantize_minmax(
        x.data_ptr(),
        *runs,
        qmin,
        qmax,
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return (codes, scale, zero_point) if good else None


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_shape: Shape,
    out: Tensor | None = None,
) -> Tensor | None:
    """fp32 values of int8 ``codes`` by the kernels; None where they cannot."""
    if codes.dtype != torch.int8 or (zero_point is not None and zero_point.dtype != torch.int8):
        return None
    runs = _runs(tuple(codes.shape), block_shape) if codes.ndim else None
    if runs is None:
        return None
    scale, zero_point, runs = _spread(scale.float(), zero_point, runs)
    kernels = _kernels(*(t for t in (codes, scale, zero_point, out) if t is not None))
    if kernels is None:
        return None
    values = torch.empty(codes.shape, dtype=torch.float32) if out is None else out
    kernels.qkit_dequantize(
        codes.data_ptr(),
        *runs,
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values


def _spread(
    scale: Tensor, zero_point: Tensor | None, runs: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None, tuple[int, int, int]]:
    """Cut one block that is the whole tensor into pieces, so that all threads have work."""
    rows, columns, block = runs
    piece = next((p for p in (1 << 14, 1 << 12, 1 << 10) if columns % p == 0), None)
    if rows != 1 or block < columns or piece is None or piece >= columns:
        return scale, zero_point, runs
    pieces = columns // piece
    zero = None if zero_point is None else zero_point.flatten().repeat(pieces)
    return scale.flatten().repeat(pieces), zero, (pieces, piece, piece)
