"""Every operator of qkit: its schema, what its arguments mean, and (but for convolutions) its fake.

The weight arguments are the same everywhere, and are the stored layout (``qkit.packing.store``):

``weight``      int8 ``[N, ...]`` for 8 bits (uint8 or an fp8 with ``levels``), or int32
                ``[N, ceil(K * bits / 32)]`` below
``scale``       float ``[N, ceil(K / group)]``, ``[N, 1]`` per channel or ``[1, 1]`` per tensor
``zero_point``  int8 of the shape of ``scale``, or none where symmetric
``levels``      float ``[2^bits]``: a code stands for ``levels[code] * scale``
``bits``        1 to 8
``group``       columns that share a scale; 0 for whole rows

``x`` is fp16, bf16, fp32 or fp64; the result has its dtype. Products are summed in fp32 (fp64 for
fp64). ``linear``, ``linear_codebook`` and ``convolution`` take the exact activations.
``linear_dynamic`` first rounds each row of ``x`` to integers of ``act_bits`` with a scale (and a
zero point, unless ``act_symmetric``) from the range of that row; ``linear_static`` with the
``act_scale`` and ``act_zero_point`` given (none: symmetric). Both as :mod:`qkit.numerics.affine`
does; a row that is not finite gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qkit.packing import packed_words
from qkit.spec.granularity import ceil_div

_WEIGHT = "Tensor weight, Tensor scale, Tensor? zero_point"
_BOOK = "Tensor weight, Tensor scale, Tensor levels"
_LINEAR = f"Tensor x, {_WEIGHT}, Tensor? bias, int bits, int group"
_TO_FLOAT = "int bits, int group, int columns, ScalarType dtype"

SCHEMAS = {
    # [..., K] -> [..., N]
    "linear": f"({_LINEAR}) -> Tensor",
    "linear_codebook": f"(Tensor x, {_BOOK}, Tensor? bias, int bits, int group) -> Tensor",
    "linear_dynamic": f"({_LINEAR}, int act_bits, bool act_symmetric, "
    "bool act_full=False) -> Tensor",
    "linear_static": f"({_LINEAR}, int act_bits, Tensor act_scale, Tensor? act_zero_point) "
    "-> Tensor",
    # [B, C, *size] -> [B, N, *size'] with zero padding, K = C / groups * prod(kernel): a row of the
    # weight is an output channel, transposed or not
    "convolution": f"({_LINEAR}, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool transposed, int[] output_padding) -> Tensor",
    "conv2d": f"({_LINEAR}, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    # the float matrix [N, columns]
    "dequantize": f"({_WEIGHT}, {_TO_FLOAT}) -> Tensor",
    "dequantize_codebook": f"({_BOOK}, {_TO_FLOAT}) -> Tensor",
    # rows of that matrix: [...] of 0 .. N - 1 -> [..., columns]
    "embedding": f"(Tensor indices, {_WEIGHT}, {_TO_FLOAT}) -> Tensor",
}

# What activations, and so float weights, may be.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(x: Tensor, op: str) -> None:
    """Refuse what the operators do not take, by name."""
    torch._check(x.dtype in FLOATS, lambda: f"qkit::{op}: x must be a float tensor, got {x.dtype}")


def check_indices(op: str, indices: Tensor) -> None:
    """Refuse what does not name rows."""
    torch._check(
        indices.dtype in (torch.int64, torch.int32),
        lambda: f"qkit::{op}: indices must be int32 or int64, got {indices.dtype}",
    )


def check_weight(
    op: str, weight: Tensor, scale: Tensor, columns: int, bits: int, group: int
) -> None:
    """Refuse a weight or a scale that is not one of ``columns`` columns.

    Below 8 bits the weight is whole words, and so is this check.
    """
    torch._check(1 <= bits <= 8, lambda: f"qkit::{op}: a weight has 1 to 8 bits, got {bits}")
    rows = weight.shape[0]
    if bits == 8:
        have = math.prod(weight.shape[1:])
        torch._check(
            have == columns,
            lambda: f"qkit::{op}: x has {columns} features, the weight has {have}",
        )
    else:
        words = packed_words(columns, bits)
        torch._check(
            weight.ndim == 2 and weight.shape[1] == words,
            lambda: (
                f"qkit::{op}: x has {columns} features, which are {words} words of {bits} bits; "
                f"the weight has shape {tuple(weight.shape)}"
            ),
        )
    groups = ceil_div(columns, group) if group else min(columns, 1)
    torch._check(
        tuple(scale.shape) in ((rows, groups), (1, 1)),
        lambda: (
            f"qkit::{op}: the scale has shape {tuple(scale.shape)}, the weight needs "
            f"{(rows, groups)}"
        ),
    )


def linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """Shape and dtype of ``linear``."""
    check_float(x, "linear")
    check_weight("linear", weight, scale, x.shape[-1], bits, group)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def dequantize_fake(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of ``dequantize``."""
    check_weight("dequantize", weight, scale, columns, bits, group)
    return weight.new_empty((weight.shape[0], columns), dtype=dtype)


def linear_codebook_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """Shape and dtype of ``linear_codebook``."""
    check_levels("linear_codebook", levels, bits)
    return linear_fake(x, weight, scale, None, bias, bits, group)


def check_levels(op: str, levels: Tensor, bits: int) -> None:
    """Refuse a codebook that has not one level for each code."""
    torch._check(
        levels.shape == (1 << bits,),
        lambda: f"qkit::{op}: {bits} bits want {1 << bits} levels, got {tuple(levels.shape)}",
    )


def check_acts(op: str, act_bits: int) -> None:
    """Refuse activations of too few or too many bits."""
    torch._check(
        2 <= act_bits <= 8, lambda: f"qkit::{op}: activations have 2 to 8 bits, got {act_bits}"
    )


def linear_dynamic_fake(
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
) -> Tensor:
    """Shape and dtype of ``linear_dynamic``."""
    check_acts("linear_dynamic", act_bits)
    return linear_fake(x, weight, scale, zero_point, bias, bits, group)


def linear_static_fake(
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
) -> Tensor:
    """Shape and dtype of ``linear_static``."""
    check_acts("linear_static", act_bits)
    check_act_qparams(act_scale, act_zero_point)
    return linear_fake(x, weight, scale, zero_point, bias, bits, group)


def check_act_qparams(act_scale: Tensor, act_zero_point: Tensor | None) -> None:
    """Refuse a static scale or zero point that is not one number."""
    for name, value in (("act_scale", act_scale), ("act_zero_point", act_zero_point)):
        torch._check(
            value is None or value.numel() == 1,
            lambda name=name: f"qkit::linear_static: {name} must be one number",
        )


def dequantize_codebook_fake(
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of ``dequantize_codebook``."""
    check_levels("dequantize_codebook", levels, bits)
    return dequantize_fake(weight, scale, None, bits, group, columns, dtype)


def embedding_fake(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of ``embedding``."""
    check_indices("embedding", indices)
    check_weight("embedding", weight, scale, columns, bits, group)
    return weight.new_empty((*indices.shape, columns), dtype=dtype)


FAKES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_fake,
    "linear_codebook": linear_codebook_fake,
    "linear_dynamic": linear_dynamic_fake,
    "linear_static": linear_static_fake,
    "dequantize": dequantize_fake,
    "dequantize_codebook": dequantize_codebook_fake,
    "embedding": embedding_fake,
}
