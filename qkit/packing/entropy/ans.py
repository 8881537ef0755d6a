"""Range asymmetric numeral systems (rANS) with interleaved states.

Duda, "Asymmetric numeral systems", arXiv 1311.2540; Giesen, "Interleaved entropy coders", arXiv
1402.3392. A symbol of frequency ``f`` out of ``M = 2^b`` costs ``log2(M / f)`` bits, fractions
included.

**Frequencies.** ``b`` is the least of 12..15 whose cost is within 0.1% of that of 15.
``f = max(1, floor(count * M / total))`` for a present symbol, then corrected one unit at a time
by Webster's (Sainte-Laguë's) rule until they add up to ``M``: the next unit goes to the symbol of
the greatest ``count / (2 f + 1)``, or is taken from the least ``count / (2 f - 1)`` with ``f > 1``;
at a tie, the lowest symbol. No present symbol gets 0. A symbol owns the slots
``start .. start + f - 1`` of 0..M - 1, in the order of the symbols.

**Table.** ``b`` (1 byte), the bitmap of the symbols, the frequency of each present one (2 bytes).

**Block.** ``lanes`` states (4 bytes each), then words (2 bytes each). Symbol ``i`` belongs to
lane ``i % lanes``. For each symbol in turn, with the lane's state ``x`` in [2^16, 2^32)::

    slot = x mod M           s = the symbol that owns slot
    x = f[s] * (x div M) + slot - start[s]
    if x < 2^16:  x = x * 2^16 + the next word

Encoding does the inverse from the last symbol to the first; it begins with ``x = 2^16`` in each
lane, so that decoding must end with that, and with the last word used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qkit.packing.entropy import alphabet
from qkit.packing.entropy.section import corrupt

MIN_BITS, MAX_BITS = 12, 15
LOW = 1 << 16
WORD_BITS = 16


def normalise(counts: NDArray[np.int64], bits: int) -> NDArray[np.uint16]:
    """Frequencies with the sum ``2^bits``, at least 1 for each present symbol (see above)."""
    total, size = int(counts.sum()), 1 << bits
    f = np.array([max(1, c * size // total) if c else 0 for c in counts.tolist()])
    while (missing := size - int(f.sum())) != 0:
        if missing > 0:
            f[np.argmax(counts / (2 * f + 1))] += 1
        else:
            f[np.argmin(np.where(f > 1, counts / np.maximum(2 * f - 1, 1), np.inf))] -= 1
    return f.astype(np.uint16)


def cost(counts: NDArray[np.int64], frequencies: NDArray[np.uint16], bits: int) -> float:
    """``sum(count * log2(2^bits / f))`` bits."""
    used = counts > 0
    return float((counts[used] * (bits - np.log2(frequencies[used].astype(np.float64)))).sum())


@dataclass(frozen=True)
class Ans:
    """A coder, given by the frequency of each of the 256 symbols (0: absent)."""

    frequencies: NDArray[np.uint16]
    bits: int
    method: ClassVar[str] = "ans"

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> Ans:
        """The frequencies for symbols that occur so often."""
        finest = cost(counts, normalise(counts, MAX_BITS), MAX_BITS)
        for bits in range(MIN_BITS, MAX_BITS):
            frequencies = normalise(counts, bits)
            if cost(counts, frequencies, bits) <= 1.001 * finest:
                return cls(frequencies, bits)
        return cls(normalise(counts, MAX_BITS), MAX_BITS)

    @classmethod
    def from_table(cls, table: bytes) -> Ans:
        """The stored frequencies; :class:`~qkit.errors.InputError` if they are not any."""
        present = alphabet.from_bitmap(table[1:])
        bits = table[0]
        if not MIN_BITS <= bits <= MAX_BITS:
            raise corrupt(f"frequencies of {bits} bits")
        stored = table[1 + alphabet.BITMAP_BYTES :]
        if not present.any() or len(stored) != 2 * present.sum():
            raise corrupt(f"{len(stored)} bytes of frequencies")
        frequencies = np.zeros(alphabet.SIZE, np.uint16)
        frequencies[present] = np.frombuffer(stored, "<u2")
        if not frequencies[present].all() or frequencies.sum(dtype=np.int64) != 1 << bits:
            raise corrupt("the frequencies do not add up")
        return cls(frequencies, bits)

    def to_table(self) -> bytes:
        """The inverse of :meth:`from_table`."""
        present = self.frequencies > 0
        stored = self.frequencies[present].astype("<u2").tobytes()
        return bytes([self.bits]) + alphabet.to_bitmap(present) + stored

    def arguments(self) -> tuple[Any, ...]:
        """What the compiled functions get."""
        return (self.frequencies.ctypes.data, self.bits)

    def _starts(self) -> NDArray[np.uint64]:
        f = self.frequencies.astype(np.uint64)
        return np.cumsum(f) - f

    def encode(self, symbols: NDArray[np.uint8], lanes: int) -> list[bytes]:
        """One block of bytes for each row of ``symbols [blocks, n]``."""
        blocks, n = symbols.shape
        steps = math.ceil(n / lanes)
        padded = np.zeros((blocks, steps * lanes), np.uint8)
        padded[:, :n] = symbols
        by_step = padded.reshape(blocks, steps, lanes).swapaxes(0, 1)
        frequency, start = self.frequencies.astype(np.uint64), self._starts()
        limit = frequency << np.uint64(32 - self.bits)
        states = np.full((blocks, lanes), LOW, np.uint64)
        words = np.empty((steps, blocks, lanes), "<u2")
        emitted = np.zeros((steps, blocks, lanes), bool)
        shift, word = np.uint64(self.bits), np.uint64(WORD_BITS)
        for step in reversed(range(steps)):
            active = min(lanes, n - step * lanes)
            s, x = by_step[step, :, :active], states[:, :active]
            full = x >= limit[s]
            emitted[step, :, :active] = full
            words[step, :, :active] = x & np.uint64(LOW - 1)
            x = np.where(full, x >> word, x)
            f = frequency[s]
            quotient = x // f
            states[:, :active] = (quotient << shift) + (x - quotient * f) + start[s]
        heads = states.astype("<u4")
        return [heads[b].tobytes() + words[:, b][emitted[:, b]].tobytes() for b in range(blocks)]

    def decode(self, parts: Sequence[memoryview], n: int, lanes: int) -> NDArray[np.uint8]:
        """``[blocks, n]`` symbols; all lanes of all blocks take one step at a time."""
        head = 4 * lanes
        if any(len(part) < head or len(part) % 2 for part in parts):
            raise corrupt("a block does not hold its states and whole words")
        x = np.stack([np.frombuffer(part, "<u4", lanes) for part in parts])
        if (x < LOW).any():
            raise corrupt("a state is out of range")
        # One word too many, so that there is always one to be read.
        stream = b"".join([part[head:] for part in parts] + [bytes(2)])
        words = np.frombuffer(stream, "<u2").astype(np.uint32)
        counts = np.array([(len(part) - head) // 2 for part in parts])
        ends = np.cumsum(counts)
        # The place before the next word of each block: cumsum counts from 1.
        at = (ends - counts - 1)[:, None]
        symbol = np.repeat(np.arange(alphabet.SIZE, dtype=np.uint8), self.frequencies)
        frequency = self.frequencies[symbol].astype(np.uint32)
        rank = (np.arange(1 << self.bits) - self._starts()[symbol].astype(np.int64)).astype(
            np.uint32
        )
        steps, shift, mask = -(-n // lanes), np.uint32(self.bits), np.uint32((1 << self.bits) - 1)
        out = np.empty((steps, len(parts), lanes), np.uint8)
        for step in range(steps):
            active = min(lanes, n - step * lanes)
            y = x[:, :active]
            slot = y & mask
            out[step, :, :active] = symbol.take(slot)
            y = frequency.take(slot) * (y >> shift) + rank.take(slot)
            low = y < LOW
            place = at + np.cumsum(low, axis=1)
            refilled = y << np.uint32(WORD_BITS) | words.take(place, mode="clip")
            x[:, :active] = np.where(low, refilled, y)
            at = place[:, -1:]
        if (at.ravel() + 1 != ends).any() or (x != LOW).any():
            raise corrupt("a block does not end where it should")
        return out.swapaxes(0, 1).reshape(len(parts), steps * lanes)[:, :n]
