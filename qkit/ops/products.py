"""A convolution as one product of its patches with the stored weight, where that is faster.

Dequantizing a weight for torch's convolution takes as long however few outputs there are. With few
of them (the last layers of a CNN, a step of speech), the kernels for linear layers, which read the
codes themselves, are faster, although the patches must be laid out for them.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from qkit.ops import native

# Measured with one thread on layers of ResNets, MobileNets and speech encoders. A 1x1 convolution
# has its patches as they are: many values of the weight are enough. Others must copy them: at most
# so many patches, with so many values of the weight for each.
MANY_VALUES = 3 << 17
MAX_PATCHES, MAX_PIXELS, VALUES_PER_PATCH = 64, 512, 16_000


def _faster(patches: int, values: int, pointwise: bool) -> bool:
    if pointwise:
        return patches <= MAX_PIXELS and values >= MANY_VALUES
    return patches <= min(MAX_PATCHES, values // VALUES_PER_PATCH)


def product(
    kernels: ctypes.CDLL,
    stored: native.Stored,
    x: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    geometry: tuple[Any, ...],
) -> Tensor | None:
    """The convolution of ``x`` as a product; None where it is not the faster way.

    Arguments are those of :func:`qkit.ops.convolutions.run`; the result is in the dtype and the
    memory format that torch's convolution has.
    """
    stride, padding, dilation, groups, transposed, _ = geometry
    n, values = len(kernel), stored.rows * stored.columns
    if values < VALUES_PER_PATCH or transposed or groups != 1 or n > 2:
        return None
    if x.dim() == n + 1:
        y = product(kernels, stored, x.unsqueeze(0), bias, kernel, geometry)
        return None if y is None else y.squeeze(0)
    along = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    size = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in along]
    patches, pointwise = len(x) * math.prod(size), math.prod(kernel) == 1 and not any(padding)
    if patches <= 0 or min(size) <= 0 or not _faster(patches, values, pointwise):
        return None
    # torch rounds what is not fp32 once, at the end.
    y = native.multiply(kernels, _patches(x.float(), kernel, geometry, pointwise), stored)
    if bias is not None:
        y += bias.float()
    form = suggest_memory_format(x) if n == 2 else torch.contiguous_format
    out = torch.empty(len(x), stored.rows, *size, dtype=x.dtype, memory_format=form)
    return out.copy_(y.view(len(x), *size, stored.rows).movedim(-1, 1))


def _patches(x: Tensor, kernel: list[int], geometry: tuple[Any, ...], pointwise: bool) -> Tensor:
    """``[B, C, *size]`` -> ``[B, positions, C * prod(kernel)]``."""
    stride, padding, dilation, *_ = geometry
    if pointwise:
        for dim, step in enumerate(stride, 2):
            x = x[(slice(None),) * dim + (slice(None, None, step),)]
        return x.flatten(2).transpose(1, 2)
    if x.dim() == 3:
        x, kernel = x.unsqueeze(2), [1, *kernel]
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    patches = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return patches.transpose(1, 2)
