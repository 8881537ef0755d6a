"""The range of least loss on a histogram: squared error, or Kullback-Leibler divergence.

The ranges that are tried shrink the least and greatest value by powers of ``2^(1/8)`` down to
``2^-11``, then around the best by powers of ``2^(1/64)``. A symmetric range has one threshold. An
affine range is first shrunk as a whole, then end by end. The widest of equally good ranges wins,
so the answer is never worse than min-max, and data that clipping cannot help keep their range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qkit.numerics.affine import dequantize, qparams_from_range, quantize
from qkit.numerics.histogram import Histogram
from qkit.numerics.tensors import QTensor
from qkit.spec import Int, PerChannel, QSpec

# (spec, values [n], counts [n], width, lo [k], hi [k]) -> [k]
Loss = Callable[[QSpec, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_COARSE = [2 ** (-i / 8) for i in range(8 * 11 + 1)]
_FINE = [2 ** (i / 64) for i in range(7, -8, -1)]
_BOTH = (True, True)


def best_range(histogram: Histogram, spec: QSpec, loss: Loss) -> tuple[Tensor, Tensor]:
    """The range ``lo <= 0 <= hi`` (float64 ``[channels]``) of least ``loss`` in each channel."""
    ranges = [
        _search(
            lo.clamp(max=0),
            hi.clamp(min=0),
            partial(loss, spec, *histogram.channel(c), histogram.width[c]),
            spec.symmetric,
        )
        for c, (lo, hi) in enumerate(zip(histogram.lo, histogram.hi, strict=True))
    ]
    lows, highs = zip(*ranges, strict=True)
    return torch.stack(lows), torch.stack(highs)


def _search(
    least: Tensor, greatest: Tensor, loss: Callable[[Tensor, Tensor], Tensor], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The best of the ranges that the head of this file describes, inside [least, greatest]."""
    if symmetric:
        steps = [(_COARSE, _BOTH), (_FINE, _BOTH)]
    else:
        ends = [(True, False), (False, True)]
        steps = [(_COARSE, _BOTH), *((_COARSE, end) for end in ends)]
        steps += [(_FINE, end) for end in ends]
    lo, hi = least, greatest
    for ratios, (move_lo, move_hi) in steps:
        ratio = least.new_tensor(ratios)
        low, high = (least, greatest) if ratios is _COARSE else (lo, hi)
        if symmetric:
            threshold = torch.maximum(-low, high)
            low, high = -threshold, threshold
        # The range so far comes first, so that it stays where nothing is better.
        lows = torch.cat([lo[None], low * ratio if move_lo else lo.expand(len(ratio))])
        highs = torch.cat([hi[None], high * ratio if move_hi else hi.expand(len(ratio))])
        lows, highs = lows.clamp(min=least), highs.clamp(max=greatest)
        best = loss(lows, highs).argmin()
        lo, hi = lows[best], highs[best]
    return lo, hi


def _quantized(values: Tensor, lo: Tensor, hi: Tensor, spec: QSpec) -> QTensor:
    """``values`` ``[n]`` quantized with each of the ranges, ``[k, n]``."""
    spec = replace(spec, granularity=PerChannel(0))
    x = values.expand(len(lo), -1)
    return quantize(x, qparams_from_range(lo[:, None], hi[:, None], spec), spec)


def squared_error(
    spec: QSpec, values: Tensor, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor
) -> Tensor:
    """Mean squared error of quantizing ``values`` ``[n]`` that occur ``counts`` times.

    ``lo`` and ``hi`` are ``[k]`` ranges, and so is the result. The error of one value is its
    distance to the nearest of the representable numbers, and a distance changes by no more than
    the value does. So where all values are within half a ``width`` of the data, the root mean
    square error is within half a ``width`` of the data's own (Minkowski's inequality).
    """
    error = dequantize(_quantized(values, lo, hi, spec), torch.float64) - values
    return (error.square_() * counts).sum(1) / counts.sum()


def divergence(
    spec: QSpec, values: Tensor, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor
) -> Tensor:
    """Kullback-Leibler divergence ``sum p log(p / q)`` of the quantized distribution, in nats.

    ``p`` is the histogram with what is outside the range moved to the outermost cells inside;
    ``q`` has the mass of each code, of the inside alone, spread evenly over the cells of that
    code (Migacz 2017, "8-bit inference with TensorRT", GTC s7310). Unlike the widespread code:

    * the cells of a code are those that the format really rounds to it (not ``size // codes``
      neighbours, with all that is left over in the last code), so any format has its own answer;
    * ``q`` is not truncated to integers, nor is its last cell left empty;
    * empty cells count in neither distribution, and outliers move to a cell that is not empty, so
      nothing has to be smoothed;
    * zeros are left out, because they are exact in every range; the classic peak at zero of an
      activation after ReLU would otherwise ask for as narrow a range as there is;
    * ranges with a step finer than a cell are infinitely bad, as the histogram cannot judge them.
    """
    fmt = spec.format
    assert isinstance(fmt, Int)
    values, counts = values[values != 0], counts[values != 0]
    q = _quantized(values, lo, hi, spec)
    too_fine = q.qparams.scale[:, 0].abs() < width
    if not len(values):
        return torch.zeros_like(lo)
    inside = (values >= lo[:, None]) & (values <= hi[:, None])
    kept = counts * inside
    code = q.codes.long() - fmt.qmin

    def of_code(x: Tensor) -> Tensor:
        per_code = x.new_zeros(len(lo), fmt.qmax - fmt.qmin + 1)
        return per_code.scatter_add_(1, code, x).gather(1, code)

    spread = of_code(kept) / of_code(inside.double()) / kept.sum(1, keepdim=True)
    # The values ascend: the outermost cells inside are the first and the last.
    clipped = kept.clone()
    for outside, cell in (
        (values < lo[:, None], inside.long().argmax(1, keepdim=True)),
        (values > hi[:, None], len(values) - 1 - inside.flip(1).long().argmax(1, keepdim=True)),
    ):
        clipped.scatter_add_(1, cell, (counts * outside).sum(1, keepdim=True))
    p = clipped / counts.sum()
    result = torch.where(inside, p * (p / spread).log(), 0).sum(1)
    return torch.where(too_fine | ~inside.any(1), torch.inf, result)
