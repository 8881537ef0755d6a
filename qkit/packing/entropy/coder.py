"""Encode an array of codes as a section, decode it, and measure the methods."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from qkit.errors import InputError, UsageError
from qkit.packing.entropy import alphabet, compiled, sparse
from qkit.packing.entropy.ans import Ans
from qkit.packing.entropy.huffman import Huffman
from qkit.packing.entropy.section import (
    DTYPES,
    MAX_BLOCK_LOG2,
    MAX_LANES_LOG2,
    METHODS,
    Layout,
    Section,
    corrupt,
    read,
    write,
)

CODERS: dict[str, type[Huffman] | type[Ans]] = {"huffman": Huffman, "ans": Ans}
# A lane costs a few bytes in each block: fewer of them where there are few symbols.
SYMBOLS_PER_LANE = 1024
# How many blocks one task treats: enough for numpy to be busy, few enough for little memory.
TASK_BLOCKS = 16
# Below this share of the most frequent code, sparse coding cannot pay.
SPARSE_SHARE = 0.25

Symbols = NDArray[np.uint8]


@dataclass(frozen=True)
class CodingStats:
    """Bits per symbol of each method (everything in the section counted), and the bound."""

    elements: int
    entropy: float
    bits: dict[str, float]

    @property
    def best(self) -> str:
        """The method that ``auto`` takes."""
        return min(self.bits, key=self.bits.__getitem__)


def encode(
    codes: Tensor | ArrayLike,
    method: str = "auto",
    *,
    block_log2: int = MAX_BLOCK_LOG2,
    threads: int | None = None,
) -> bytes:
    """The section (see ``section``) of an int8 or uint8 array of any shape and strides.

    ``auto`` takes the smallest of ``raw``, ``huffman``, ``ans`` and, if one code makes up at
    least a quarter of all, ``sparse``; of equally small ones the first. An empty array is raw.
    Blocks of ``2^block_log2`` symbols are coded independently with one table. The bytes depend
    on neither the number of threads (default: up to 4) nor the presence of compiled kernels.
    Raises :class:`~qkit.errors.UsageError` for another dtype or method.

    >>> decode(encode(np.array([[1, -2, 1], [1, 1, 1]], dtype=np.int8))).tolist()
    [[1, -2, 1], [1, 1, 1]]
    """
    if method not in ("auto", *METHODS):
        raise UsageError("unknown coding", got=method, wanted=f"auto, {', '.join(METHODS)}")
    if not 0 <= block_log2 <= MAX_BLOCK_LOG2:
        raise UsageError("a block has 2^0 to 2^16 symbols", got=f"2^{block_log2}")
    array = _array(codes)
    symbols = array.reshape(-1).view(np.uint8)
    layout = Layout("raw", array.dtype, array.shape, 0, block_log2, b"")
    counts = alphabet.counts(symbols)
    methods = _candidates(counts) if method == "auto" else (method,)
    return min((_encode(symbols, counts, layout, m, threads) for m in methods), key=len)


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_elements: int | None = None,
    threads: int | None = None,
) -> NDArray:
    """The array that :func:`encode` was given: same shape, dtype and codes.

    Raises :class:`~qkit.errors.InputError` if the bytes are anything but one whole section, or
    state more than ``max_elements`` elements. The output is allocated after the header, whose
    index bounds it (see ``section``), has been checked.
    """
    section = read(memoryview(data).cast("B"))
    layout = section.layout
    if max_elements is not None and layout.elements > max_elements:
        raise InputError("a section states too many elements", got=layout.elements)
    try:
        symbols = DECODERS[layout.method](section, threads)
    except MemoryError:
        raise corrupt(f"no memory for the {layout.elements} elements it states") from None
    return symbols.view(layout.dtype).reshape(layout.shape)


def stats(codes: Tensor | ArrayLike, *, threads: int | None = None) -> CodingStats:
    """How many bits per symbol each method takes, next to the order-0 entropy of the codes.

    The methods are those that ``auto`` tries. An empty array's bits are those of its section.
    """
    array = _array(codes)
    counts = alphabet.counts(array.reshape(-1).view(np.uint8))
    bits = {
        method: 8 * len(encode(array, method, threads=threads)) / max(array.size, 1)
        for method in _candidates(counts)
    }
    return CodingStats(array.size, alphabet.entropy(counts), bits)


def breakdown(data: bytes | memoryview) -> tuple[str, dict[str, int]]:
    """The method of a section, and where its bytes go: by what they hold, all of them.

    ``codes``, or the ``gaps`` and ``values`` of a sparse section, are the coded blocks; ``tables``
    those of the codes; ``headers`` the rest. Raises what :func:`decode` raises for a bad header.
    """
    section = read(memoryview(data).cast("B"))
    kinds = ("gaps", "values") if section.layout.method == "sparse" else ("codes",)
    inner = [read(section.part(i)) for i in range(2)] if len(kinds) == 2 else [section]
    found = {kind: len(part.payload) for kind, part in zip(kinds, inner, strict=True)}
    every = {id(each): each for each in (section, *inner)}.values()
    found["tables"] = sum(len(each.layout.table) for each in every)
    found["headers"] = len(data) - sum(found.values())
    return section.layout.method, found


def _array(codes: Tensor | ArrayLike) -> NDArray:
    if isinstance(codes, Tensor):
        if codes.dtype not in (torch.int8, torch.uint8):  # numpy lacks some of the others
            raise UsageError("codes are int8 or uint8", got=codes.dtype)
        codes = codes.detach().cpu().numpy()
    array = np.asarray(codes, order="C")
    if array.dtype not in DTYPES:
        raise UsageError("codes are int8 or uint8", got=array.dtype)
    return array


def _candidates(counts: NDArray[np.int64]) -> tuple[str, ...]:
    """The methods that ``auto`` tries, in the order of preference."""
    total = int(counts.sum())
    if total == 0:
        return ("raw",)
    return METHODS if counts.max() >= SPARSE_SHARE * total else METHODS[:-1]


def _encode(
    symbols: Symbols, counts: NDArray[np.int64], layout: Layout, method: str, threads: int | None
) -> bytes:
    layout = replace(layout, method=method if symbols.size else "raw")
    if layout.method == "raw":
        step = layout.block
        return write(
            layout, [symbols[i : i + step].tobytes() for i in range(0, symbols.size, step)]
        )
    if layout.method == "sparse":
        background = int(counts.argmax())
        parts = [_encode_part(s, layout, threads) for s in sparse.split(symbols, background)]
        return write(replace(layout, table=bytes([background])), parts)
    coder = CODERS[method].from_counts(counts)
    lanes = max(1, min(symbols.size, layout.block) // SYMBOLS_PER_LANE)
    lanes_log2 = min(MAX_LANES_LOG2, lanes.bit_length() - 1)
    layout = replace(layout, lanes_log2=lanes_log2, table=coder.to_table())
    kernels = compiled.library()

    def run(first: int, last: int) -> list[bytes]:
        if kernels is not None:
            return compiled.encode(kernels, coder, symbols, layout.block, layout.lanes, first, last)
        parts = []
        for begin, end in _equal(layout, first, last):
            rows = symbols[begin * layout.block : end * layout.block].reshape(end - begin, -1)
            parts += coder.encode(rows, layout.lanes)
        return parts

    return write(layout, [part for parts in _map(run, layout.blocks, threads) for part in parts])


def _encode_part(stream: Symbols, layout: Layout, threads: int | None) -> bytes:
    """The smallest section of the gaps or the values of a sparse section.

    No sparse within sparse: decoding would recurse as deep as a hostile file likes.
    """
    counts = alphabet.counts(stream)
    inner = Layout("raw", DTYPES[0], stream.shape, 0, layout.block_log2, b"")
    methods = [method for method in _candidates(counts) if method != "sparse"]
    return min((_encode(stream, counts, inner, m, threads) for m in methods), key=len)


def _decode_raw(section: Section, threads: int | None) -> Symbols:
    if section.layout.table or len(section.payload) != section.layout.elements:
        raise corrupt("raw codes that are not one byte each")
    for i in range(section.layout.blocks):
        section.part(i)
    return np.array(section.payload, np.uint8)


def _decode_blocks(section: Section, threads: int | None) -> Symbols:
    layout = section.layout
    coder = CODERS[layout.method].from_table(layout.table)
    kernels = compiled.library()
    out = np.empty(layout.elements, np.uint8)

    def run(first: int, last: int) -> None:
        parts = [section.part(i) for i in range(first, last)]
        if kernels is not None:
            return compiled.decode(kernels, coder, section, first, last, out)
        for begin, end in _equal(layout, first, last):
            span = out[begin * layout.block : end * layout.block]
            n = span.size // (end - begin)
            rows = coder.decode(parts[begin - first : end - first], n, layout.lanes)
            span[:] = rows.reshape(-1)
        return None

    _map(run, layout.blocks, threads)
    return out


def _decode_sparse(section: Section, threads: int | None) -> Symbols:
    layout = section.layout
    if len(layout.table) != 1:
        raise corrupt("a sparse section has a table of one byte")
    inner = [read(section.part(i)) for i in range(2)]
    for part in inner:
        fits = len(part.layout.shape) == 1 and part.layout.elements <= layout.elements
        if part.layout.method == "sparse" or part.layout.dtype != DTYPES[0] or not fits:
            raise corrupt("the gaps and values of a sparse section")
    if layout.elements >= sparse.ESCAPE * (inner[0].layout.elements + 1):
        raise corrupt("the gaps do not fill the tensor")
    gaps, values = (DECODERS[part.layout.method](part, threads) for part in inner)
    out = np.empty(layout.elements, np.uint8)
    sparse.join(gaps, values, layout.table[0], out)
    return out


DECODERS: dict[str, Callable[[Section, int | None], Symbols]] = {
    "raw": _decode_raw,
    "huffman": _decode_blocks,
    "ans": _decode_blocks,
    "sparse": _decode_sparse,
}


def _equal(layout: Layout, first: int, last: int) -> list[tuple[int, int]]:
    """The runs of equally long blocks in ``first .. last - 1``: all, or all but the short last."""
    if last == layout.blocks and layout.elements % layout.block and last - first > 1:
        return [(first, last - 1), (last - 1, last)]
    return [(first, last)]


def _map(run: Callable, blocks: int, threads: int | None) -> list:
    """``run(first, last)`` for the blocks in tasks, in order; in threads if there are several."""
    starts = range(0, blocks, TASK_BLOCKS)
    tasks = [(first, min(first + TASK_BLOCKS, blocks)) for first in starts]
    workers = min(threads or min(4, os.cpu_count() or 1), len(tasks))
    if workers < 2:
        return [run(*task) for task in tasks]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda task: run(*task), tasks))
