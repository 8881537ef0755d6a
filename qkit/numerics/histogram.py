"""A streaming histogram whose counts do not depend on how the data was cut into batches.

The magnitudes below ``2^e`` are cut into ``bins`` cells of the width ``w = 2^e / bins``, once for
each sign, and zero has a cell of its own::

    cell(x) = sign(x) * (floor(|x| / w) + 1)        -bins .. bins

``e`` is the least exponent with ``|x| < 2^e`` for all that was seen. When it grows, ``2^s`` cells
become one: since both ``bins`` and ``w`` are powers of two, ``floor(floor(|x| / w) / 2^s)`` is
``floor(|x| / (2^s w))`` without any rounding. So no count is ever split or lost, and the result is
the one that all of the data at once would have given, in any order, bit for bit. (Binning to a
fixed first range, or spreading counts when the range grows as torch's HistogramObserver does, has
neither property.) By this choice of ``e``, ``w <= 2 max|x| / bins``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Values that are binned at a time, which bounds the memory beyond the counts.
CHUNK = 1 << 20
# The exponent of data that is all zero: low enough for fp32's denormal numbers, and a width of
# 2^LEAST_EXPONENT / bins is still a normal float64.
LEAST_EXPONENT = -1000


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of ``channels`` rows of values.

    ``counts`` is int64 of the shape ``[channels, 2 * bins + 1]`` from the cell ``-bins`` to
    ``bins``; ``exponent`` (int64), ``lo`` and ``hi`` (float64, the exact extremes) are
    ``[channels]``.
    """

    lo: Tensor
    hi: Tensor
    exponent: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Tensor, bins: int) -> Histogram:
        """The histogram of finite ``rows`` ``[channels, n]``, n > 0; ``bins`` is a power of two."""
        lo, hi = rows.amin(1).double(), rows.amax(1).double()
        peak = torch.maximum(-lo, hi)
        exponent = torch.where(peak > 0, torch.frexp(peak).exponent.long(), LEAST_EXPONENT)
        exponent = exponent.clamp(min=LEAST_EXPONENT)
        width = _width(exponent, bins)[:, None]
        channels, cells = len(rows), 2 * bins + 1
        first = torch.arange(channels, device=rows.device)[:, None] * cells + bins
        counts = torch.zeros(channels * cells, dtype=torch.int64, device=rows.device)
        for part in rows.split(max(CHUNK // channels, 1), 1):
            x = part.double()
            cell = (x.sign() * ((x.abs() / width).floor_() + 1)).long()
            counts += torch.bincount((cell + first).flatten(), minlength=channels * cells)
        return Histogram(lo, hi, exponent, counts.reshape(channels, cells))

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of both data sets."""
        exponent = torch.maximum(self.exponent, other.exponent)
        return Histogram(
            torch.minimum(self.lo, other.lo),
            torch.maximum(self.hi, other.hi),
            exponent,
            self._grown(exponent) + other._grown(exponent),
        )

    def _grown(self, exponent: Tensor) -> Tensor:
        """The counts with the cells of a greater ``exponent``."""
        if torch.equal(exponent, self.exponent):
            return self.counts
        # More bits than an index has: a shift beyond them would be undefined, and changes nothing.
        shift = (exponent - self.exponent).clamp(max=self.bins.bit_length())[:, None]
        cell = self.cells
        moved = cell.sign() * (((cell.abs() - 1).clamp(min=0) >> shift) + 1)
        return torch.zeros_like(self.counts).scatter_add_(1, moved + self.bins, self.counts)

    @property
    def bins(self) -> int:
        """Cells for each sign."""
        return self.counts.shape[1] // 2

    @property
    def cells(self) -> Tensor:
        """The cells' numbers ``-bins .. bins``."""
        return torch.arange(-self.bins, self.bins + 1, device=self.counts.device)

    @property
    def width(self) -> Tensor:
        """The width of a cell in each channel, float64."""
        return _width(self.exponent, self.bins)

    @property
    def n(self) -> int:
        """Values seen per channel."""
        return int(self.counts[0].sum())

    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """Value and count, float64 and ascending, of the cells of one channel that are not empty.

        The value is the middle of the cell, or the nearest that is inside ``[lo, hi]``: at most
        half a width from everything in the cell, and exactly zero for zeros.
        """
        filled = self.counts[index].nonzero()[:, 0]
        cell = (filled - self.bins).double()
        middle = cell.sign() * (cell.abs() - 0.5) * self.width[index]
        return middle.clamp(self.lo[index], self.hi[index]), self.counts[index][filled].double()

    def bounds(self, clipped: int) -> tuple[Tensor, Tensor]:
        """The range that leaves out at most ``clipped`` values on each side, float64 [channels].

        With ``x`` the values in ascending order, ``hi - w <= x[n - 1 - clipped] <= hi``, and the
        like for ``lo``: nothing more is left out, and at most one width is given away.
        """
        upper = torch.minimum(_upper(self.counts, clipped) * self.width, self.hi)
        lower = torch.maximum(-_upper(self.counts.flip(1), clipped) * self.width, self.lo)
        return lower, upper


def _upper(counts: Tensor, clipped: int) -> Tensor:
    """The upper edge, in widths, of the cell that holds the greatest value but ``clipped``."""
    from_above = (counts.flip(1).cumsum(1) > clipped).long().argmax(1)
    cell = counts.shape[1] // 2 - from_above
    return torch.where(cell < 0, cell + 1, cell)


def _width(exponent: Tensor, bins: int) -> Tensor:
    """``2^exponent / bins`` in float64. Exact, which exp2 does not promise."""
    return ((exponent - (bins.bit_length() - 1) + 1023) << 52).view(torch.float64)
