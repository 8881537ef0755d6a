"""Canonical Huffman codes of at most 12 bits.

**Code.** Lengths are optimal under the limit: package-merge (Larmore and Hirschberg, "A fast
algorithm for optimal length-limited Huffman codes", J. ACM 37(3), 1990). Codes are canonical as
in RFC 1951 section 3.2.2: shorter codes first, equal lengths in the order of the symbols, so
that the lengths are all that is stored. The lengths fulfil Kraft's equality
``sum(2^-length) = 1``; one symbol alone has the 1-bit code 0 (and 1 is read as the same symbol).
12 bits, so that one table of 4096 entries decodes a symbol.

**Table.** The bitmap of the symbols, then the length of each present symbol in ascending order,
4 bits each, low half of a byte first, the last half zero if unused.

**Block.** ``lanes`` streams: first the bytes of each (2 each), then the streams. With
``m = ceil(n / lanes)``, stream ``j`` holds the symbols ``j*m .. (j+1)*m - 1`` of the block. Its
bits are filled from the least significant bit of each byte, a code's most significant bit
first, as in RFC 1951 section 3.1.1; the last byte is filled up with zeros.

A code has at least 1 bit per symbol, so that a skewed alphabet stays far from the entropy: two
symbols of probabilities 0.99 and 0.01 take 1 bit instead of 0.081. ``ans`` has no such floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qkit.packing.entropy import alphabet
from qkit.packing.entropy.section import corrupt

MAX_LENGTH = 12


def code_lengths(weights: Sequence[int], limit: int = MAX_LENGTH) -> list[int]:
    """Lengths of an optimal prefix code of at most ``limit`` bits: package-merge.

    Minimises ``sum(weight * length)``. Symbols of weight 0 get the length 0, one symbol alone the
    length 1. Needs ``2^limit`` to be at least the number of symbols.
    """
    lengths = [0] * len(weights)
    order = sorted((s for s, w in enumerate(weights) if w > 0), key=lambda s: weights[s])
    if len(order) < 2:
        for symbol in order:
            lengths[symbol] = 1
        return lengths
    # Level by level, packages are pairs of the level before; a level is (weight, is a symbol).
    leaves = [(int(weights[s]), True) for s in order]
    levels = [leaves]
    for _ in range(limit - 1):
        last = levels[-1]
        packages = [(last[i][0] + last[i + 1][0], False) for i in range(0, len(last) // 2 * 2, 2)]
        levels.append(sorted(leaves + packages, key=lambda item: item[0]))
    # The lightest 2(n - 1) of the last level; a package among them takes two of the level before.
    take = 2 * (len(order) - 1)
    for level in reversed(levels):
        symbols = sum(is_symbol for _, is_symbol in level[:take])
        for symbol in order[:symbols]:
            lengths[symbol] += 1
        take = 2 * (take - symbols)
    return lengths


def canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The code of each symbol, most significant bit first (RFC 1951 section 3.2.2)."""
    codes = np.zeros(len(lengths), np.uint32)
    code = 0
    for length in range(1, MAX_LENGTH + 1):
        symbols = np.flatnonzero(lengths == length)
        code <<= 1
        codes[symbols] = np.arange(code, code + len(symbols))
        code += len(symbols)
    return codes


def reverse_bits(codes: NDArray[np.uint32], lengths: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Each code read from its other end, as a stream stores it."""
    out = np.zeros_like(codes)
    for i in range(MAX_LENGTH):
        bit = (codes >> np.uint32(i)) & 1
        shift = np.maximum(lengths.astype(np.int64) - 1 - i, 0).astype(np.uint32)
        out |= np.where(i < lengths, bit << shift, 0).astype(np.uint32)
    return out


@dataclass(frozen=True)
class Huffman:
    """A code, given by the length of each of the 256 symbols (0: absent)."""

    lengths: NDArray[np.uint8]
    method: ClassVar[str] = "huffman"

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> Huffman:
        """The optimal code for symbols that occur so often."""
        return cls(np.array(code_lengths(counts.tolist()), np.uint8))

    @classmethod
    def from_table(cls, table: bytes) -> Huffman:
        """The stored code; :class:`~qkit.errors.InputError` if it is not complete."""
        present = alphabet.from_bitmap(table)
        n = int(present.sum())
        if n == 0 or len(table) != alphabet.BITMAP_BYTES + (n + 1) // 2:
            raise corrupt(f"a table of {len(table)} bytes for {n} symbols")
        halves = np.frombuffer(table, np.uint8, offset=alphabet.BITMAP_BYTES)
        stored = np.stack([halves & 15, halves >> 4], axis=1).ravel()
        if n % 2 and stored[n]:
            raise corrupt("the code table does not end with zero")
        lengths = np.zeros(alphabet.SIZE, np.uint8)
        lengths[present] = stored[:n]
        used = stored[:n].astype(np.int64)
        kraft = (1 << (MAX_LENGTH - used.clip(0, MAX_LENGTH))).sum()
        complete = kraft == 1 << MAX_LENGTH or (n == 1 and used[0] == 1)
        if used.min() < 1 or used.max() > MAX_LENGTH or not complete:
            raise corrupt("the code lengths are not those of a complete code")
        return cls(lengths)

    def to_table(self) -> bytes:
        """The inverse of :meth:`from_table`."""
        used = self.lengths[self.lengths > 0]
        used = np.append(used, np.zeros(len(used) % 2, np.uint8))
        return alphabet.to_bitmap(self.lengths > 0) + (used[::2] | used[1::2] << 4).tobytes()

    def arguments(self) -> tuple[Any, ...]:
        """What the compiled functions get."""
        return (self.lengths.ctypes.data,)

    def encode(self, symbols: NDArray[np.uint8], lanes: int) -> list[bytes]:
        """One block of bytes for each row of ``symbols [blocks, n]``."""
        blocks, n = symbols.shape
        each = -(-n // lanes)
        codes = reverse_bits(canonical_codes(self.lengths), self.lengths)
        length = np.zeros((blocks, lanes * each), np.int64)
        length[:, :n] = self.lengths[symbols]
        value = np.zeros((blocks, lanes * each), np.uint32)
        value[:, :n] = codes[symbols]
        ends = np.cumsum(length.reshape(blocks, lanes, each), axis=2)
        stream_bytes = (ends[..., -1] + 7) // 8
        stream_ends = np.cumsum(stream_bytes).reshape(blocks, lanes)
        position = (stream_ends - stream_bytes)[..., None] * 8 + ends
        position = position.ravel() - length.ravel()
        # A code touches at most 3 bytes; no two codes share a bit, so that adding is or-ing.
        shifted = value.ravel() << (position & 7).astype(np.uint32)
        total = int(stream_ends[-1, -1])
        stream = np.zeros(total + 3)
        for i in range(3):
            byte = shifted >> np.uint32(8 * i) & 255
            stream += np.bincount((position >> 3) + i, weights=byte, minlength=total + 3)
        data = stream[:total].astype(np.uint8)
        cuts = np.split(data, stream_ends[:-1, -1])
        heads = stream_bytes.astype("<u2")
        return [head.tobytes() + cut.tobytes() for head, cut in zip(heads, cuts, strict=True)]

    def decode(self, parts: Sequence[memoryview], n: int, lanes: int) -> NDArray[np.uint8]:
        """``[blocks, n]`` symbols; all streams of all blocks take one step at a time."""
        blocks, each = len(parts), -(-n // lanes)
        sizes = np.array([_stream_bytes(part, lanes) for part in parts], np.int64)
        data = np.frombuffer(b"".join([p[2 * lanes :] for p in parts] + [bytes(3)]), np.uint8)
        window = data[:-2].astype(np.uint32) | data[1:-1].astype(np.uint32) << np.uint32(8)
        window |= data[2:].astype(np.uint32) << np.uint32(16)
        symbol, length = self._decode_table()
        ends = 8 * np.cumsum(sizes.ravel())
        position = ends - 8 * sizes.ravel()
        # The last streams of a block may be shorter, or empty.
        count = np.tile(np.clip(n - each * np.arange(lanes), 0, each), blocks)
        shortest = int(count.min())
        out = np.empty((each, blocks * lanes), np.uint8)
        for step in range(each):
            at = position >> 3
            bits = window.take(at, mode="clip") >> (position & 7).astype(np.uint32)
            index = bits & ((1 << MAX_LENGTH) - 1)
            out[step] = symbol[index]
            position += length[index] if step < shortest else length[index] * (step < count)
        used = position + 7 >> 3
        if (used << 3 != ends).any():
            raise corrupt("a stream does not end where it should")
        return out.T.reshape(blocks, lanes * each)[:, :n]

    def _decode_table(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The symbol that the next 12 bits begin with, and the length of its code."""
        codes = reverse_bits(canonical_codes(self.lengths), self.lengths)
        symbol = np.zeros(1 << MAX_LENGTH, np.uint8)
        for s in np.flatnonzero(self.lengths):
            symbol[codes[s] :: 1 << int(self.lengths[s])] = s
        if np.count_nonzero(self.lengths) == 1:
            symbol[:] = symbol[0]
        return symbol, self.lengths[symbol].astype(np.int64)


def _stream_bytes(part: memoryview, lanes: int) -> NDArray[np.uint16]:
    """The sizes at the beginning of a block; they add up to its size."""
    if len(part) < 2 * lanes:
        raise corrupt("a block is shorter than the sizes of its streams")
    sizes = np.frombuffer(part, "<u2", lanes)
    if sizes.sum(dtype=np.int64) != len(part) - 2 * lanes:
        raise corrupt("the streams of a block are not as long as it is")
    return sizes
