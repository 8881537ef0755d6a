"""The operators on the compiled kernels, where they apply; everything else is the reference's.

They apply to tensors on the CPU and to inputs of fp32, bf16 and fp16; fp64 keeps its precision in
the reference. The weight is used as it is stored: nothing is repacked or kept.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from qkit import native
from qkit.packing import packed_words
from qkit.spec import Int
from qkit.spec.granularity import ceil_div

# What the kernels read and write, by their number for it; fp64 would lose precision.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INDICES = (torch.int64, torch.int32)

# What a scale may be, and codes of 8 bits that stand for levels.
SCALES = (*TYPES, torch.float8_e8m0fnu)
BYTES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)

# From here on there is a whole large page in a tensor, wherever it lies.
KEPT_BYTES = 4 << 20

# What becomes of the activations: `kind` in kernels/qkit.h.
EXACT, SYMMETRIC, AFFINE, STATIC = range(4)
_EXACT = native.Acts(EXACT, 0, 0, 0.0, 0)


class Stored:
    """A stored weight as the kernels take it, and the tensors that must outlive it."""

    def __init__(self, weight: native.Weight, *tensors: Tensor | None) -> None:
        self.weight = weight
        self.pointer = ctypes.addressof(weight)
        self.columns = int(weight.columns)
        self.rows = int(weight.n)
        self.tensors = tensors


def stored(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    levels: Tensor | None = None,
) -> Stored | None:
    """A weight for the kernels; None if they do not read it, or if anything is amiss.

    Everything is checked here, because the kernels check nothing; the reference says what is wrong.
    """
    rows = weight.shape[0] if weight.ndim else 0
    bytes_ = (torch.int8,) if levels is None else BYTES
    width = columns if bits == 8 else packed_words(columns, bits)
    shared = tuple(scale.shape) == (1, 1) and group == 0
    blocks = ceil_div(columns, group) if group else 1
    given = [t for t in (weight, scale, zero_point, bias, levels) if t is not None]
    if (
        rows * columns == 0
        or not 1 <= bits <= 8
        or group < 0
        or math.prod(weight.shape[1:]) != width
        or (bits < 8 and weight.ndim != 2)
        or any(t.device.type != "cpu" for t in given)
        or weight.dtype not in (bytes_ if bits == 8 else (torch.int32,))
        or scale.dtype not in SCALES
        or not (shared or tuple(scale.shape) == (rows, blocks))
        or (zero_point is not None and zero_point.dtype != torch.int8)
        or (zero_point is not None and zero_point.shape != scale.shape)
        # A bias of fp64 is added in fp64, by the reference.
        or (bias is not None and (bias.dtype not in TYPES or tuple(bias.shape) != (rows,)))
        or (levels is not None and (levels.dtype not in TYPES or levels.shape != (1 << bits,)))
    ):
        return None
    weight, scale = weight.contiguous(), _wide(scale)
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else _wide(bias)
    levels = None if levels is None else _wide(levels)
    pointers = native.Weight(
        weight.data_ptr(),
        rows,
        columns,
        weight.numel() * weight.element_size() // rows,
        group,
        bits,
        int(scale.shape[0] != rows),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        None if levels is None else levels.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )
    return Stored(pointers, weight, scale, zero_point, bias, levels)


def keep(kernels: ctypes.CDLL | None, weight: Stored) -> None:
    """Make a large weight that will be used again quicker to read."""
    for tensor in weight.tensors:
        nbytes = 0 if tensor is None else tensor.nbytes
        if kernels is not None and tensor is not None and nbytes >= KEPT_BYTES:
            kernels.qkit_keep(tensor.data_ptr(), nbytes)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _done(code: int) -> None:
    if code:
        raise MemoryError("qkit: no memory for the scratch of a linear layer")


def multiply(kernels: ctypes.CDLL, x: Tensor, weight: Stored, acts: native.Acts = _EXACT) -> Tensor:
    """``x @ W.T + bias`` for ``x`` of one of TYPES on the CPU, with matching columns."""
    *outer, columns = x.shape
    rows = x.numel() // columns
    x = x.detach().contiguous()
    out = torch.empty(*outer, weight.rows, dtype=x.dtype)
    _done(
        kernels.qkit_linear(
            weight.pointer,
            ctypes.addressof(acts),
            x.data_ptr(),
            TYPES[x.dtype],
            rows,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    acts: native.Acts | None = _EXACT,
    levels: Tensor | None = None,
) -> Tensor | None:
    kernels = native.library()
    if kernels is None or x.dtype not in TYPES or x.device.type != "cpu" or x.ndim == 0:
        return None
    w = stored(weight, scale, zero_point, bias, bits, group, x.shape[-1], levels)
    return None if w is None or acts is None else multiply(kernels, x, w, acts)


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
    return _linear(x, weight, scale, zero_point, bias, bits, group)


def linear_codebook(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor | None:
    """``qkit::linear_codebook``; None where the reference has to do it (or to refuse it)."""
    return _linear(x, weight, scale, None, bias, bits, group, levels=levels)


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    act_bits: int,
    act_symmetric: bool,
    act_full: bool = False,
) -> Tensor | None:
    """``qkit::linear_dynamic``; None where the reference has to do it (or to refuse it)."""
    acts = dynamic_acts(act_bits, act_symmetric, act_full)
    return _linear(x, weight, scale, zero_point, bias, bits, group, acts)


def linear_static(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    act_bits: int,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
) -> Tensor | None:
    """``qkit::linear_static``; None where the reference has to do it (or to refuse it)."""
    acts = static_acts(act_bits, act_scale, act_zero_point)
    return _linear(x, weight, scale, zero_point, bias, bits, group, acts)


@functools.cache
def dynamic_acts(bits: int, symmetric: bool, full: bool = False) -> native.Acts | None:
    """Integers with the scale of each row, ``full`` if symmetric ones use the lowest too; None for
    other ``bits`` than the kernels take."""
    if not 2 <= bits <= 8:
        return None
    fmt = Int(bits, narrow=symmetric and not full)
    return native.Acts(SYMMETRIC if symmetric else AFFINE, fmt.qmin, fmt.qmax, 0.0, 0)


def static_acts(bits: int, scale: Tensor, zero_point: Tensor | None) -> native.Acts | None:
    """Integers with a scale that is known; None for other ``bits`` than the kernels take, or for
    more than one scale."""
    one = scale.numel() == 1 and (zero_point is None or zero_point.numel() == 1)
    if not 2 <= bits <= 8 or not one:
        return None
    fmt, zero = Int(bits, narrow=zero_point is None), 0 if zero_point is None else int(zero_point)
    return native.Acts(STATIC, fmt.qmin, fmt.qmax, float(scale), zero)


# What becomes of the activations, by the operator, from its arguments after those of `linear`.
ACTS: dict[str, Callable[..., native.Acts | None]] = {
    "linear": lambda: _EXACT,
    "linear_codebook": lambda: _EXACT,
    "linear_dynamic": dynamic_acts,
    "linear_static": static_acts,
}


def _decode(
    kernels: ctypes.CDLL, weight: Stored, indices: Tensor | None, dtype: torch.dtype
) -> Tensor:
    count = weight.rows if indices is None else indices.numel()
    return decode(kernels, weight, indices, torch.empty(count, weight.columns, dtype=dtype))


def decode(kernels: ctypes.CDLL, weight: Stored, indices: Tensor | None, out: Tensor) -> Tensor:
    """The rows ``indices`` (int64; None: all) of the float weight, written into ``out``.

    ``out`` is ``[rows, columns]`` of one of TYPES; the indices are known to be rows.
    """
    _done(
        kernels.qkit_decode(
            weight.pointer,
            None if indices is None else indices.data_ptr(),
            out.shape[0],
            TYPES[out.dtype],
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


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
    if kernels is None or dtype not in TYPES:
        return None
    w = stored(weight, scale, zero_point, None, bits, group, columns)
    return None if w is None else _decode(kernels, w, None, dtype)


def dequantize_codebook(
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """``qkit::dequantize_codebook``; None where the reference has to do it (or to refuse it)."""
    kernels = native.library()
    if kernels is None or dtype not in TYPES:
        return None
    w = stored(weight, scale, None, None, bits, group, columns, levels)
    return None if w is None else _decode(kernels, w, None, dtype)


def embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """``qkit::embedding``; None where the reference has to do it (or to refuse it)."""
    kernels = native.library()
    if (
        kernels is None
        or dtype not in TYPES
        or indices.device.type != "cpu"
        or indices.dtype not in INDICES
    ):
        return None
    w = stored(weight, scale, zero_point, None, bits, group, columns)
    return None if w is None else look_up(kernels, w, indices, dtype)


def look_up(
    kernels: ctypes.CDLL, weight: Stored, indices: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The rows ``indices`` of the float weight; None if one of them is not a row."""
    flat = indices.reshape(-1).to(torch.int64).contiguous()
    if flat.numel():
        low, high = flat.aminmax()
        if int(low) < 0 or int(high) >= weight.rows:
            return None
    return _decode(kernels, weight, flat, dtype).reshape(*indices.shape, weight.columns)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor | None]] = {
    "linear": linear,
    "linear_codebook": linear_codebook,
    "linear_dynamic": linear_dynamic,
    "linear_static": linear_static,
    "dequantize": dequantize,
    "dequantize_codebook": dequantize_codebook,
    "embedding": embedding,
}
