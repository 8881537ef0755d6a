"""Codebooks fitted to a tensor: clustered weights that share the values of few entries.

Entries have the shape ``granularity.scale_shape(x.shape) + (k,)``: each block has ``k`` of its
own, ascending. Codes are places in them, uint8, of the shape of ``x``. The entries that minimize
``sum_i importance_i * (x_i - entry(i))^2`` are found by :mod:`qkit.numerics.kmeans`; those of
fixed codes are the means of what they stand for, and the gradient of an entry is the sum of the
gradients of its values (Han et al. 2016, Deep Compression, arXiv 1510.00149, section 3).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkit.errors import InputError, UsageError
from qkit.numerics.affine import check_finite
from qkit.numerics.blocks import from_blocks, per_block, to_blocks
from qkit.numerics.kmeans import Array, kmeans
from qkit.numerics.values import midpoints
from qkit.spec import Granularity, PerTensor

Shape = tuple[int, ...]

WHOLE = PerTensor()
MAX_SORTED = 1 << 16
_BIN_SHIFT = 11  # a bin has the sign, the exponent and 12 bits of the mantissa of fp32


def fit_codebook(
    x: Tensor,
    k: int,
    importance: Tensor | None = None,
    granularity: Granularity = WHOLE,
    *,
    name: str = "tensor",
) -> Tensor:
    """The ``k`` entries for each block of ``x`` with the least (weighted) squared error.

    ``x`` has any shape and float dtype; ``importance`` (not negative; a value's importance of 2
    is the value twice) can be broadcast to it. Returns ``scale_shape + (k,)`` in fp32 (fp64 for
    fp64). A block with fewer than ``k`` distinct values has them all as entries, the greatest
    repeated; values without importance do not count, unless a whole block has none.

    Optimal for up to 4096 distinct values in a block. In a block of more than 65536 values,
    those that agree in the first 13 bits of their mantissa count as one. Deterministic. Takes
    some milliseconds a block, so it is for tensors and groups of channels.

    Raises :class:`~qkit.errors.UsageError` for another ``k`` than 2 to 256, and
    :class:`~qkit.errors.InputError` if ``x`` is not finite or an importance is impossible.
    """
    if not 2 <= k <= 256:
        raise UsageError("a codebook has 2 to 256 entries", got=k)
    check_finite(x, name)
    shape = tuple(x.shape)
    block_shape = granularity.block_shape(shape)
    rows, weights = _rows(x.detach(), block_shape), _rows(torch.ones(shape), block_shape)
    if importance is not None:
        given = _rows(_checked(importance, shape, name), block_shape)
        weights = torch.where(given.any(1, keepdim=True), given, weights.double())
    entries = torch.empty(len(rows), k, dtype=_work(x))
    for out, row, weight in zip(entries, rows.cpu(), weights.cpu(), strict=True):
        centers = torch.from_numpy(kmeans(*_points(row, weight), k))
        out[: len(centers)] = centers
        out[len(centers) :] = centers[-1]
    return entries.reshape(*granularity.scale_shape(shape), k).to(x.device)


def assign(x: Tensor, entries: Tensor, granularity: Granularity = WHOLE) -> Tensor:
    """The place (uint8, of the shape of ``x``) of the entry nearest to each value of ``x``.

    The tie goes to the lower place. ``x`` is finite; ``entries`` are those of its blocks, as
    :func:`fit_codebook` returns them. Raises :class:`~qkit.errors.UsageError` for others.
    """
    shape = tuple(x.shape)
    _check_entries(entries, shape, granularity)
    block_shape = granularity.block_shape(shape)
    rows = _rows(x, block_shape).to(_work(x))
    borders = midpoints(entries.double().reshape(len(rows), entries.shape[-1]), rows.dtype)
    codes = torch.searchsorted(borders, rows, out_int32=True).to(torch.uint8)
    return _from_rows(codes, shape, block_shape)


def lookup(codes: Tensor, entries: Tensor, granularity: Granularity = WHOLE) -> Tensor:
    """The entry of each code, of the shape of ``codes`` and the dtype of ``entries``.

    The gradient of an entry is the sum over its values, taken in fp64 in a fixed order.
    """
    _check_entries(entries, tuple(codes.shape), granularity)
    values: Tensor = _Lookup.apply(entries, _places(codes, entries, granularity))
    return values


def cluster_means(
    x: Tensor,
    codes: Tensor,
    entries: Tensor,
    importance: Tensor | None = None,
    granularity: Granularity = WHOLE,
) -> Tensor:
    """``entries``, each moved to the (weighted) mean of the values of ``x`` that have its code.

    ``x`` and ``codes`` have one shape. An entry without values (or without importance) stays.
    """
    _check_entries(entries, tuple(x.shape), granularity)
    places, n = _places(codes, entries, granularity).flatten(), entries.numel()
    ones = torch.ones((), dtype=torch.float64, device=x.device)
    weights = ones if importance is None else _checked(importance, tuple(x.shape), "tensor")
    weights = weights.expand(x.shape).flatten()
    mass = torch.bincount(places, weights, minlength=n)
    total = torch.bincount(places, weights * x.detach().double().flatten(), minlength=n)
    old = entries.detach().double().flatten()
    means = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), old)
    return means.reshape(entries.shape).to(entries.dtype)


class _Lookup(torch.autograd.Function):
    """``entries[places]``, with gradients summed per entry."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.entries_shape = entries.shape
        return entries.flatten().index_select(0, places.flatten()).reshape(places.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        n = math.prod(ctx.entries_shape)
        total = torch.bincount(places.flatten(), gradient.flatten().double(), minlength=n)
        return total.reshape(ctx.entries_shape).to(gradient.dtype), None


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _checked(importance: Tensor, shape: Shape, name: str) -> Tensor:
    """``importance`` in fp64 and of ``shape``."""
    weights = importance.detach().double()
    check_finite(weights, f"importance of {name}")
    if (weights < 0).any():
        raise InputError("an importance is not negative", where=name, got=float(weights.min()))
    try:
        return weights.expand(shape)
    except RuntimeError as error:
        got = tuple(weights.shape)
        raise InputError("not the shape of an importance", got=got, wanted=shape) from error


def _check_entries(entries: Tensor, shape: Shape, granularity: Granularity) -> None:
    wanted = granularity.scale_shape(shape)
    if tuple(entries.shape[:-1]) != wanted or not 1 <= entries.shape[-1] <= 256:
        raise UsageError(
            "not the entries of this tensor", got=tuple(entries.shape), wanted=f"{wanted} + (k,)"
        )


def _places(codes: Tensor, entries: Tensor, granularity: Granularity) -> Tensor:
    """Places in the flattened ``entries``, of the shape of ``codes``."""
    shape, places = tuple(codes.shape), codes.long()
    counts = entries.shape[:-1]
    if math.prod(counts) > 1:
        first = torch.arange(math.prod(counts), device=codes.device).reshape(counts)
        blocks = to_blocks(places, granularity.block_shape(shape))
        places = from_blocks(blocks + per_block(first) * entries.shape[-1], shape)
    return places


def _rows(x: Tensor, block_shape: Shape) -> Tensor:
    """``x`` as a matrix ``[blocks, values of a block]``; what a short block lacks is zero."""
    blocks = to_blocks(x, block_shape)
    order = [*range(0, blocks.ndim, 2), *range(1, blocks.ndim, 2)]
    count = math.prod(blocks.shape[::2])
    return blocks.permute(order).reshape(count, math.prod(block_shape)).contiguous()


def _from_rows(rows: Tensor, shape: Shape, block_shape: Shape) -> Tensor:
    """The inverse of :func:`_rows`."""
    counts = [-(-n // b) for n, b in zip(shape, block_shape, strict=True)]
    d = len(shape)
    order = [axis for i in range(d) for axis in (i, d + i)]
    return from_blocks(rows.reshape(*counts, *block_shape).permute(order), shape)


def _points(x: Tensor, weights: Tensor) -> tuple[Array, Array]:
    """The ascending distinct values of a block with a weight, and the sums of their weights."""
    if len(x) > MAX_SORTED:
        bins = (x.float().view(torch.int32) >> _BIN_SHIFT) + (1 << (31 - _BIN_SHIFT))
        weights = weights.double()  # in fp32, a bin would stop counting at 2^24
        mass = torch.bincount(bins, weights)
        x = torch.bincount(bins, weights * x) / mass
        weights = mass
    counts = weights > 0
    values, places = np.unique(x[counts].double().numpy(), return_inverse=True)
    return values, np.bincount(places, weights[counts].numpy()).astype(np.float64)
