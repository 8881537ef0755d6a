"""A reader of entropy-coded sections that is slow and obvious: bit by bit, symbol by symbol."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")


def decode_oracle(data: bytes) -> NDArray:
    """The array of a section that is known to be good; checksums are not looked at."""
    r = Reader(data)
    assert r.take(5) == b"QENT\x01"
    method, dtype, dims, lanes_log2, block_log2 = r.take(5)
    table_bytes = r.number(2)
    shape = [r.number(8) for _ in range(dims)]
    table = Reader(r.take(table_bytes))
    n, block, lanes = math.prod(shape), 1 << block_log2, 1 << lanes_log2
    blocks = 2 if method == 3 else math.ceil(n / block)
    sizes = [(r.number(4), r.number(4))[0] for _ in range(blocks)]
    r.take(4)
    parts = [r.take(size) for size in sizes]
    assert r.at == len(data)
    counts = [min(block, n - b * block) for b in range(blocks)]
    if method == 0:
        out = list(b"".join(parts))
    elif method == 1:
        symbols = present(table)
        lengths = [table.data[32 + i // 2] >> 4 * (i % 2) & 15 for i in range(len(symbols))]
        code = codebook(dict(zip(symbols, lengths, strict=True)))
        pairs = zip(parts, counts, strict=True)
        out = [s for p, c in pairs for s in huffman_block(Reader(p), c, lanes, code)]
    elif method == 2:
        bits = table.number(1)
        frequency = {s: table.number(2) for s in present(table)}
        pairs = zip(parts, counts, strict=True)
        out = [s for p, c in pairs for s in ans_block(Reader(p), c, lanes, bits, frequency)]
    else:
        background = table.number(1)
        gaps, values = (decode_oracle(part).tolist() for part in parts)
        out = []
        for gap in gaps:
            out += [background] * gap + ([values.pop(0)] if gap != 255 else [])
        assert not values
        assert n - len(out) < 255
        out += [background] * (n - len(out))
    array = np.array(out, np.uint8)
    return (array.view(np.int8) if dtype == 1 else array).reshape(shape)


def present(table: Reader) -> list[int]:
    bitmap = table.number(32)
    return [s for s in range(256) if bitmap >> s & 1]


def codebook(lengths: dict[int, int]) -> dict[str, int]:
    """The canonical code as strings of 0 and 1, by counting up and appending zeros."""
    book, code, length = {}, 0, 0
    for size, symbol in sorted((size, s) for s, size in lengths.items()):
        code <<= size - length
        length = size
        book[f"{code:0{length}b}"] = symbol
        code += 1
    return book


def huffman_block(r: Reader, n: int, lanes: int, book: dict[str, int]) -> list[int]:
    sizes, each, out = [r.number(2) for _ in range(lanes)], math.ceil(n / lanes), []
    for lane, size in enumerate(sizes):
        bits = iter("".join(f"{byte:08b}"[::-1] for byte in r.take(size)))
        for _ in range(max(0, min(each, n - lane * each))):
            word = ""
            while word not in book:
                word += next(bits)
            out.append(book[word])
        rest = "".join(bits)
        assert len(rest) < 8
        assert "1" not in rest
    return out


def ans_block(r: Reader, n: int, lanes: int, bits: int, frequency: dict[int, int]) -> list[int]:
    states, out = [r.number(4) for _ in range(lanes)], []
    owner = [(s, rank) for s, f in frequency.items() for rank in range(f)]
    assert len(owner) == 1 << bits
    for i in range(n):
        div, slot = divmod(states[i % lanes], 1 << bits)
        symbol, rank = owner[slot]
        x = frequency[symbol] * div + rank
        states[i % lanes] = x if x >= 1 << 16 else x << 16 | r.number(2)
        out.append(symbol)
    assert states == [1 << 16] * lanes
    assert r.at == len(r.data)
    return out
