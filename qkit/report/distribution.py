"""The distribution of values before and after they are rounded, with the grid of their codes.

The values of a tensor with a scale for each block have no common grid; divided by their scales
(and moved by the zero points) they have: that of the codes. So ``x / scale + zero_point`` is what
is counted, and ``after`` are those same values, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkit.numerics import QParams
from qkit.numerics.blocks import from_blocks, per_block, to_blocks
from qkit.numerics.values import by_code
from qkit.spec import Int, QSpec

# Cells across the grid, and how many more there may be beyond either end.
CELLS = 64
BEYOND = 8
# Up to so many codes are drawn one by one.
DRAWN = 32
# Of so many tensors a report shows the distribution: the least exact.
SHOWN = 6


@dataclass(frozen=True)
class Distribution:
    """Histograms of one tensor over cells of equal ``width``; ``first`` is where they begin.

    ``before`` and ``after`` are densities: the share of the values in a cell over its width. What
    lies beyond the outermost cells is counted in them; ``after``, the share of each code is spread
    evenly over what rounds to it. The ``count`` codes stand for values from ``least`` to
    ``greatest``; ``levels`` lists them, where they are few.
    """

    name: str
    what: str
    first: float
    width: float
    before: tuple[float, ...]
    after: tuple[float, ...]
    least: float
    greatest: float
    count: int
    levels: tuple[float, ...]


def levels_of(spec: QSpec) -> Tensor:
    """What the codes of ``spec`` stand for before the scale, ascending, float64."""
    if isinstance(spec.format, Int):
        return torch.arange(spec.format.qmin, spec.format.qmax + 1, dtype=torch.float64)
    values = torch.tensor(by_code(spec.format), dtype=torch.float64)
    return values[values.isfinite()].unique()


def in_steps(x: Tensor, qparams: QParams, spec: QSpec) -> Tensor:
    """``x`` over its scales, plus the zero points: in units of the grid, flat, float32."""
    scale, zero_point = (None if p is None else p.to(torch.float32) for p in
                         (qparams.scale, qparams.zero_point))  # fmt: skip
    assert scale is not None
    blocks = to_blocks(x.float(), spec.granularity.block_shape(tuple(x.shape))) / per_block(scale)
    if zero_point is not None:
        blocks = blocks + per_block(zero_point)
    return from_blocks(blocks, tuple(x.shape)).flatten()


def distribution(
    name: str,
    what: str,
    before: Tensor,
    after: Tensor,
    levels: Tensor,
    counts: Tensor | None = None,
) -> Distribution:
    """That of values ``before`` rounding and the same ``after`` it, both flat and in units of the
    ascending ``levels``; ``counts`` says how often each value is there (once)."""
    least, greatest = float(levels[0]), float(levels[-1])
    edges = (levels[1:] + levels[:-1]) / 2
    ends = torch.stack([2 * levels[0] - edges[0], 2 * levels[-1] - edges[-1]])
    borders = torch.cat([ends[:1], edges, ends[1:]])
    # Of integers, a whole number of codes to a cell or of cells to a code.
    steps = 1 << (len(levels) - 1).bit_length()
    span = float(borders[-1] - borders[0])
    width = steps / CELLS if span == len(levels) else span / CELLS
    low, high = (float(v) for v in before.aminmax()) if before.numel() else (least, greatest)
    under = _cells_to((float(borders[0]) - low) / width)
    over = _cells_to((high - float(borders[-1])) / width)
    across = -int(-span // width)
    first = float(borders[0]) - under * width
    total = before.numel() if counts is None else float(counts.sum())

    cells = under + across + over
    sides = first + torch.arange(cells + 1, dtype=torch.float64) * width
    where = ((before - first) / width).floor().long().clamp_(0, cells - 1)
    # What rounding in fp32 left a hair beside a level belongs to it.
    code = torch.bucketize(after.double(), edges)
    weights = None if counts is None else counts.double()
    shares = [
        torch.bincount(each, weights, minlength=length).double() / max(total, 1)
        for each, length in ((where, cells), (code, len(levels)))
    ]
    below = np.concatenate([[0.0], shares[1].cumsum(0).numpy()])
    spread = torch.from_numpy(np.interp(sides.numpy(), borders.numpy(), below)).diff()
    few = levels.tolist() if len(levels) <= DRAWN else ()
    return Distribution(
        name, what, first, width, _rounded(shares[0] / width), _rounded(spread / width),
        least, greatest, len(levels), tuple(few),
    )  # fmt: skip


def _cells_to(distance: float) -> int:
    """How many cells it takes to reach that many beyond an end, or as many as there may be."""
    return min(BEYOND, max(0, -int(-distance // 1)))


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


def least_exact(sqnr_db: Sequence[float | None]) -> list[int]:
    """The places of the lowest SQNR, lowest first: what is worth a picture.

    None, where nothing was lost, is left out.

    >>> least_exact([30.0, None, 12.0])
    [2, 0]
    """
    inexact = [(value, place) for place, value in enumerate(sqnr_db) if value is not None]
    return [place for _, place in sorted(inexact)[:SHOWN]]
