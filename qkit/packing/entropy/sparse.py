"""A pruned tensor as gaps and values.

Let ``background`` be the most frequent symbol (the code of zero, in a pruned tensor), stored as
the table's one byte. Every other symbol is one entry of ``values`` and is announced by the number
of background symbols before it, its gap. A byte of ``gaps`` is

    0..254   so many background symbols, then the next value
    255      255 background symbols and no value: the escape of longer gaps

After the last value, background symbols follow to the end: an escape for each whole 255 of them,
and the rest, fewer than 255, by implication. This is the relative indexing of Han, Mao and Dally,
"Deep Compression", arXiv 1510.00149, with an escape that carries no value. Gaps and values are
each entropy coded by whichever method is the smallest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qkit.packing.entropy.section import corrupt

ESCAPE = 255
PIECE = 1 << 20


def split(symbols: NDArray[np.uint8], background: int) -> tuple[NDArray[np.uint8], ...]:
    """``(gaps, values)`` of a flat array."""
    positions = np.flatnonzero(symbols != background)
    edges = np.concatenate([[-1], positions, [symbols.size]])
    escapes, rest = np.divmod(np.diff(edges) - 1, ESCAPE)
    # A gap is its escapes and the rest; the last one, behind the last value, has no rest.
    ends = np.cumsum(escapes + 1)
    gaps = np.full(int(ends[-1]) - 1, ESCAPE, np.uint8)
    gaps[ends[:-1] - 1] = rest[:-1]
    return gaps, symbols[positions]


def join(
    gaps: NDArray[np.uint8], values: NDArray[np.uint8], background: int, out: NDArray[np.uint8]
) -> None:
    """The inverse of :func:`split`, into ``out``; InputError if that is not what they fill."""
    out.fill(background)
    done = used = 0
    for start in range(0, gaps.size, PIECE):
        piece = gaps[start : start + PIECE]
        ends = done + np.cumsum(np.minimum(piece.astype(np.int64) + 1, ESCAPE))
        positions = ends[piece != ESCAPE] - 1
        done, first, used = int(ends[-1]), used, used + positions.size
        if done > out.size or used > values.size:
            break
        out[positions] = values[first:used]
    if used != values.size or not 0 <= out.size - done < ESCAPE:
        raise corrupt("the gaps and values do not fill the tensor")
