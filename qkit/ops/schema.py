"""Every operator of qkit: its schema, what its arguments mean, and its fake.

The weight arguments are the same everywhere, and are the stored layout (``qkit.packing.store``):

``weight``      int8 ``[N, ...]`` for 8 bits, or int32 ``[N, ceil(K * bits / 32)]`` below
``scale``       float ``[N, ceil(K / group)]``, ``[N, 1]`` per channel or ``[1, 1]`` per tensor
``zero_point``  int8 of the shape of ``scale``, or none where symmetric
``bits``        1 to 8
``group``       columns that share a scale; 0 for whole rows

``x`` is fp16, bf16, fp32 or fp64; the result has its dtype. Products are summed in fp32 (fp64 for
fp64) on the exact activations: nothing here quantizes ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from qkit.packing import packed_words
from qkit.spec.granularity import ceil_div

_WEIGHT = "Tensor weight, Tensor scale, Tensor? zero_point"

SCHEMAS = {
    # [..., K] -> [..., N]
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, int bits, int group) -> Tensor",
    # [B, C, H, W] -> [B, N, H', W'], K = C / groups * kernel[0] * kernel[1]; zero padding
    "conv2d": f"(Tensor x, {_WEIGHT}, Tensor? bias, int bits, int group, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    # the float matrix [N, columns]
    "dequantize": f"({_WEIGHT}, int bits, int group, int columns, ScalarType dtype) -> Tensor",
}

# What activations, and so float weights, may be.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(x: Tensor, op: str) -> None:
    """Refuse what the operators do not take, by name."""
    torch._check(x.dtype in FLOATS, lambda: f"qkit::{op}: x must be a float tensor, got {x.dtype}")


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


def conv2d_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Shape, dtype and memory format of ``conv2d``: those of torch's own."""
    check_float(x, "conv2d")
    channels = x.shape[-3] // groups
    check_weight("conv2d", weight, scale, channels * kernel[0] * kernel[1], bits, group)
    float_weight = x.new_empty((weight.shape[0], channels, *kernel))
    return conv2d(x, float_weight, None, stride, padding, dilation, groups)


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


FAKES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_fake,
    "conv2d": conv2d_fake,
    "dequantize": dequantize_fake,
}
