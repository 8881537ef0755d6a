"""Symmetric or affine, clipped or not: chosen for one tensor by its own error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.numerics.histogram import Histogram
from qkit.numerics.observers import Mse, Observer
from qkit.numerics.search import best_range, squared_error
from qkit.spec import Granularity, Int, PerTensor, QSpec

# Decibels by which affine has to win. At 8 bits a zero point costs integer kernels a correction
# term, so affine must be clearly better (one-sided data: 6 dB). Below, bits are scarce, but less
# than this is not worth storing zero points for.
CLEARLY = 3.0
BARELY = 0.5
# An error this far below the greatest value is the rounding of a scale, not a reason.
EXACT = 1e-6


@dataclass(frozen=True, eq=False)
class Choice:
    """The ``spec``, the range ``lo <= 0 <= hi`` (of the scale's shape), and why in one line."""

    spec: QSpec
    lo: Tensor
    hi: Tensor
    reason: str


def auto(
    x: Tensor | Observer, bits: int, granularity: Granularity | None = None, *, name: str = "tensor"
) -> Choice:
    """How to quantize ``x``, a tensor or what a histogram observer has seen of it, to ``bits``.

    Each form gets the range of least squared error on the histogram (:class:`Mse`). Affine is
    chosen where its error is lower by :data:`CLEARLY` decibels at 8 bits, and by :data:`BARELY`
    below. Of 1 bit only the affine form exists. Data that symmetric represents exactly, up to the
    rounding of its scale, stay symmetric. Symmetric formats are narrow at 8 bits, and full
    below, as in the schemes.

    ``granularity`` (per tensor if not given, or per channel) is of a tensor; an observer has its
    own, and its spec's ``when`` and ``scale`` are kept too. Raises
    :class:`~qkit.errors.InputError` if ``x`` is not finite, and :class:`~qkit.errors.UsageError`
    for an observer without a histogram or data.
    """
    if isinstance(x, Tensor):
        spec = QSpec(Int(bits), granularity or PerTensor(), symmetric=False)
        observer = Observer(Mse(), spec, name)
        observer.update(x)
    elif granularity is not None:
        raise UsageError("an observer has its own granularity", where=x.name, got=str(granularity))
    else:
        observer = x
    histogram = observer.state
    if not isinstance(histogram, Histogram):
        raise UsageError(
            "a choice needs a histogram with data",
            where=observer.name,
            got=type(observer.kind).__name__ if histogram is not None else "no data",
            wanted="the observer mse, percentile or entropy, updated with at least one value",
        )
    affine = _tried(observer, Int(bits), False)
    if bits == 1:
        return _choice(affine, histogram, "affine, the only form of 1 bit")
    symmetric = _tried(observer, Int(bits, narrow=bits == 8), True)
    peak = float(torch.maximum(-histogram.lo, histogram.hi).max())
    if math.sqrt(symmetric.error) <= EXACT * peak:
        return _choice(symmetric, histogram, f"symmetric: {'exact' if peak else 'all zero'}")
    gain = 10 * math.log10(symmetric.error / affine.error) if affine.error else math.inf
    needed = CLEARLY if bits == 8 else BARELY
    if gain < needed:
        why = f"symmetric: affine would gain {gain:.1f} dB, less than {needed:g}"
        return _choice(symmetric, histogram, why)
    one_sided = bool((histogram.lo >= 0).all() or (histogram.hi <= 0).all())
    data = "one-sided" if one_sided else "off-centre"
    return _choice(affine, histogram, f"affine: the data are {data}, gains {gain:.1f} dB")


@dataclass(frozen=True, eq=False)
class _Tried:
    spec: QSpec
    lo: Tensor
    hi: Tensor
    error: float


def _tried(observer: Observer, fmt: Int, symmetric: bool) -> _Tried:
    """The best range for the format, and its mean squared error over all channels."""
    spec = replace(observer.spec, format=fmt, symmetric=symmetric)
    histogram: Histogram = observer.state
    lo, hi = best_range(histogram, spec, squared_error)
    errors = [
        squared_error(spec, *histogram.channel(c), histogram.width[c], lo[c, None], hi[c, None])
        for c in range(len(lo))
    ]
    shape = observer.scale_shape
    return _Tried(spec, lo.reshape(shape), hi.reshape(shape), float(torch.cat(errors).mean()))


def _choice(tried: _Tried, histogram: Histogram, why: str) -> Choice:
    seen = histogram.hi.clamp(min=0) - histogram.lo.clamp(max=0)
    kept = (tried.hi - tried.lo).flatten()[seen > 0] / seen[seen > 0]
    share = float(kept.mean()) if len(kept) else 1.0
    clipping = "not clipped" if share == 1 else f"clipped to {share:.1%} of the range"
    return Choice(tried.spec, tried.lo, tried.hi, f"{why}; {clipping}")
