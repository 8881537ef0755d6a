"""Range estimation: batch by batch, in constant memory, from calibration data to ``(lo, hi)``.

    observer = Observer(OBSERVERS["mse"](), spec)
    for batch in data:
        observer.update(batch)
    qparams = qparams_from_range(*observer.range(), spec)

A kind of estimator is a frozen description; what was seen is the observer's ``state``. Per-tensor
and per-channel ranges can be learnt ahead of time. Per-token ranges are taken from each value
itself (``choose_qparams``), and so are those of groups and blocks.

Whatever the kind, the range contains zero and lies inside ``[min(x, 0), max(x, 0)]``: all-zero
data give ``[0, 0]``, constant data the range from zero to the constant, and one-sided data a range
that ends at zero. For every kind but the moving average, the range depends neither on the order of
the data nor on how they are cut into batches, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qkit.errors import InputError, UsageError
from qkit.numerics.affine import check_finite
from qkit.numerics.histogram import Histogram
from qkit.numerics.search import best_range, divergence, squared_error
from qkit.spec import Int, PerChannel, PerTensor, QSpec

Range = tuple[Tensor, Tensor]

# Cells of a histogram for each sign: of 8 bits, a step is at least 16 cells of min-max's range.
BINS = 4096


class Kind(Protocol):
    """How ranges are estimated: a fold over ``rows`` ``[channels, n]`` (n > 0, finite).

    ``fold`` makes the next state (the first from ``None``), ``range`` the answer (float64
    ``[channels]``).
    """

    def fold(self, state: Any, rows: Tensor) -> Any:
        """The state after ``rows``."""

    def range(self, state: Any, spec: QSpec) -> Range:
        """The range for ``spec``, which need not contain zero yet."""


class Extremes(NamedTuple):
    """The least and greatest value of each channel, float64 ``[channels]``."""

    lo: Tensor
    hi: Tensor


@dataclass(frozen=True)
class MinMax:
    """The least and the greatest value: nothing is clipped."""

    def fold(self, state: Extremes | None, rows: Tensor) -> Extremes:
        """The extremes of both."""
        lo, hi = rows.amin(1).double(), rows.amax(1).double()
        if state is None:
            return Extremes(lo, hi)
        return Extremes(torch.minimum(state.lo, lo), torch.maximum(state.hi, hi))

    def range(self, state: Extremes, spec: QSpec) -> Range:
        """The extremes."""
        return state


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of each batch's extremes: ``lo += constant * (min(x) - lo)``.

    Like torch's MovingAverageMinMaxObserver: the first batch counts in full, and later ones by
    ``constant``. Unlike all other kinds it depends on the order and the size of the batches; it is
    meant for training, where the ranges move.
    """

    constant: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.constant <= 1:
            raise UsageError(
                "an averaging constant is more than 0 and at most 1", got=self.constant
            )

    def fold(self, state: Extremes | None, rows: Tensor) -> Extremes:
        """The averages after one more batch."""
        lo, hi = rows.amin(1).double(), rows.amax(1).double()
        if state is None:
            return Extremes(lo, hi)
        return Extremes(state.lo.lerp(lo, self.constant), state.hi.lerp(hi, self.constant))

    def range(self, state: Extremes, spec: QSpec) -> Range:
        """The averages."""
        return state


@dataclass(frozen=True)
class _Binned:
    """What the kinds that need the distribution share; see :mod:`qkit.numerics.histogram`.

    ``bins`` (a power of two) cells for each sign cost ``16 * bins`` bytes per channel, and are at
    most ``2 max|x| / bins`` wide.
    """

    bins: int = BINS

    def __post_init__(self) -> None:
        if not (2 <= self.bins <= 1 << 20 and self.bins.bit_count() == 1):
            raise UsageError("a histogram has a power of two of bins", got=self.bins, wanted=BINS)

    def fold(self, state: Histogram | None, rows: Tensor) -> Histogram:
        """The histogram of both."""
        new = Histogram.of(rows, self.bins)
        return new if state is None else state + new


@dataclass(frozen=True)
class Percentile(_Binned):
    """The range that holds ``percentile`` % of the values, as many left out below as above.

    ``floor(n * (100 - percentile) / 200)`` values may be clipped on each side; no more are, and
    the range is at most one bin wider than that would need. 100 is min-max. (ONNX Runtime's
    definition for affine formats.)
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percentile <= 100:
            raise UsageError("a percentile is more than 0 and at most 100", got=self.percentile)

    def range(self, state: Histogram, spec: QSpec) -> Range:
        """The bounds of the percentile, up to one bin."""
        # 99.9 is meant as written: as a binary fraction it would clip one value less.
        clipped = int(state.n * (100 - Fraction(str(self.percentile))) / 200)
        return state.bounds(clipped)


@dataclass(frozen=True)
class Mse(_Binned):
    """The range of least expected squared quantization error for the spec.

    The root mean square error of the answer is at most one bin width above that of any other range
    that was tried (:mod:`qkit.numerics.search`), since each is known to half a width. A search
    costs some 0.1 s per channel where thousands of cells are filled; fewer bins make it cheaper.
    """

    def range(self, state: Histogram, spec: QSpec) -> Range:
        """The best range of the search."""
        return best_range(state, spec, squared_error)


@dataclass(frozen=True)
class Entropy(_Binned):
    """The range of least Kullback-Leibler divergence: TensorRT's calibration, corrected.

    See :func:`qkit.numerics.search.divergence`. Scarce data (about one value per bin) give min-max.
    """

    def range(self, state: Histogram, spec: QSpec) -> Range:
        """The best range of the search."""
        return best_range(state, spec, divergence)


OBSERVERS: dict[str, type[Kind]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": Mse,
    "entropy": Entropy,
}


@dataclass
class Observer:
    """Watches the batches of one tensor of ``name`` and estimates its range for ``spec``.

    ``scale_shape`` is the shape of the range, known once there are data.
    Raises :class:`~qkit.errors.UsageError` unless the spec is of integers, per tensor or per
    channel.
    """

    kind: Kind
    spec: QSpec
    name: str = "tensor"
    state: Any = field(default=None, init=False)
    scale_shape: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.spec.format, Int):
            raise UsageError("only integer formats have a range", got=str(self.spec.format))
        if not isinstance(self.spec.granularity, PerTensor | PerChannel):
            raise UsageError(
                "only per-tensor and per-channel ranges are learnt ahead of time",
                where=self.name,
                got=str(self.spec.granularity),
                fix="choose_qparams takes the range from the value itself",
            )

    def update(self, x: Tensor) -> None:
        """Fold in a batch ``x`` of any float dtype and batch size; an empty one does nothing.

        Raises :class:`~qkit.errors.InputError` if ``x`` is not finite, or its number of dimensions
        or channels is not that of the batches before.
        """
        check_finite(x, self.name)
        if x.numel() == 0:
            return
        granularity = self.spec.granularity
        scale_shape = granularity.scale_shape(tuple(x.shape))
        if self.state is not None and scale_shape != self.scale_shape:
            raise InputError(
                "a batch is not like those before",
                where=self.name,
                got=f"shape {tuple(x.shape)}, scales {scale_shape}",
                wanted=f"scales {self.scale_shape}",
            )
        x = x.detach()
        axis = granularity.axis if isinstance(granularity, PerChannel) else None
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        self.state = self.kind.fold(self.state, rows)
        self.scale_shape = scale_shape

    def range(self) -> Range:
        """``(lo, hi)`` in float64, of the scale's shape, ``lo <= 0 <= hi``.

        Raises :class:`~qkit.errors.UsageError` if no value was seen.
        """
        if self.state is None:
            raise UsageError(
                "no range is known before any data",
                where=self.name,
                fix="update the observer with at least one batch that is not empty",
            )
        lo, hi = self.kind.range(self.state, self.spec)
        shape = self.scale_shape
        return lo.clamp(max=0).reshape(shape), hi.clamp(min=0).reshape(shape)
