"""Which of the 256 byte symbols occur: counts, Shannon's bound, and the bitmap in a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qkit.packing.entropy.section import corrupt

SIZE = 256
BITMAP_BYTES = SIZE // 8


def counts(symbols: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of the 256 symbols occurs in a flat array."""
    # Two symbols at a time, because bincount's time goes with the number of entries; in pieces,
    # because it makes an int64 copy of its argument.
    even = symbols.size // 2 * 2
    pairs = np.zeros(SIZE * SIZE, np.int64)
    for start in range(0, even, 1 << 20):
        piece = symbols[start : min(start + (1 << 20), even)].view(np.uint16)
        pairs += np.bincount(piece, minlength=SIZE * SIZE)
    square = pairs.reshape(SIZE, SIZE)
    return square.sum(0) + square.sum(1) + np.bincount(symbols[even:], minlength=SIZE)


def entropy(count: NDArray[np.int64]) -> float:
    """``H = -sum(p * log2(p))`` bits per symbol (Shannon 1948); 0 for no symbols."""
    p = count[count > 0] / max(int(count.sum()), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def to_bitmap(present: NDArray[np.bool_]) -> bytes:
    """32 bytes; symbol ``s`` is bit ``s % 8`` of byte ``s // 8``."""
    return np.packbits(present, bitorder="little").tobytes()


def from_bitmap(table: bytes) -> NDArray[np.bool_]:
    """The inverse of :func:`to_bitmap`, from the beginning of a table."""
    if len(table) < BITMAP_BYTES:
        raise corrupt(f"a table of {len(table)} bytes")
    bits = np.frombuffer(table, np.uint8, BITMAP_BYTES)
    return np.unpackbits(bits, bitorder="little").astype(bool)
