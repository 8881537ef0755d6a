"""Blocks: the only reshape in qkit. Any granularity becomes "reduce over the odd dimensions".

A tensor of shape ``[n0, n1, ...]`` cut into blocks of shape ``(b0, b1, ...)`` is viewed as
``[ceil(n0/b0), b0, ceil(n1/b1), b1, ...]``. A short last block is filled with zeros, which no
reduction in qkit can see: every range contains zero, and zero is exact. A scale of shape
``[ceil(n0/b0), ceil(n1/b1), ...]`` meets it as ``[ceil(n0/b0), 1, ceil(n1/b1), 1, ...]``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from qkit.numerics import fast

Shape = tuple[int, ...]


def to_blocks(x: Tensor, block_shape: Shape) -> Tensor:
    """``x`` viewed (or, where the last block is short, copied) as blocks.

    >>> import torch
    >>> to_blocks(torch.zeros(4, 6), (1, 4)).shape
    torch.Size([4, 1, 2, 4])
    """
    short = [-n % b for n, b in zip(x.shape, block_shape, strict=True)]
    if any(short):
        # torch lists the padding from the last dimension to the first, as (before, after) pairs.
        x = pad(x, [side for extra in reversed(short) for side in (0, extra)])
    return x.reshape(
        [side for n, b in zip(x.shape, block_shape, strict=True) for side in (n // b, b)]
    )


def from_blocks(blocks: Tensor, shape: Shape) -> Tensor:
    """The inverse of :func:`to_blocks`: the padding is dropped, the result is contiguous."""
    sides = blocks.shape
    padded = [sides[i] * sides[i + 1] for i in range(0, len(sides), 2)]
    x = blocks.reshape(padded)
    for axis, n in enumerate(shape):
        x = x.narrow(axis, 0, n)
    return x.contiguous()


def per_block(param: Tensor) -> Tensor:
    """A scale or zero point of shape ``[m0, m1, ...]``, shaped to meet the blocks of its tensor."""
    return param.reshape([side for n in param.shape for side in (n, 1)])


def block_range(x: Tensor, block_shape: Shape) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each block, both widened to contain zero.

    Returns two tensors of the shape of the scale, in the dtype of ``x``. An empty tensor has
    no blocks, or blocks of the range [0, 0].
    """
    by_kernel = fast.block_range(x, block_shape)
    if by_kernel is not None:
        return by_kernel
    blocks = to_blocks(x, block_shape)
    inside = tuple(range(1, blocks.ndim, 2))
    if not inside:  # a 0-dimensional tensor is one block of one element
        return blocks.clamp(max=0), blocks.clamp(min=0)
    return blocks.amin(inside).clamp_(max=0), blocks.amax(inside).clamp_(min=0)
