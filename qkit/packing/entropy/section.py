"""The bytes of a section: a checked header, a block index and independent blocks.

All numbers are little-endian and unsigned; nothing is aligned::

    bytes  field
    4      magic "QENT"
    1      version 1
    1      method: 0 raw, 1 huffman, 2 ans, 3 sparse
    1      dtype of the codes: 0 uint8, 1 int8 (coded as the uint8 of the same bits)
    1      number of dimensions d, at most 32
    1      log2 of the lanes of a block, at most 5
    1      log2 of the symbols of a block, at most 16
    2      bytes of the table t
    8 d    shape
    t      table: that of the method
    8 k    block index: for each of the k blocks its bytes (4) and their CRC-32 (4)
    4      CRC-32 of all the above
    ...    the blocks, one after the other, and nothing behind them

The codes, flattened in row-major order, are cut into blocks that decode independently, the last
one shorter. A ``sparse`` section has two blocks instead, each a section of its own: the gaps and
the values. CRC-32 is that of RFC 1952 (``zlib.crc32``). As a block has at most 2^16 symbols, a
section of s bytes states at most 8192 s elements, and a sparse one 255 times as many.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit.errors import InputError, UsageError

MAGIC, VERSION = b"QENT", 1
METHODS = ("raw", "huffman", "ans", "sparse")
DTYPES = (np.dtype(np.uint8), np.dtype(np.int8))
MAX_DIMS, MAX_LANES_LOG2, MAX_BLOCK_LOG2 = 32, 5, 16
# Far above any tensor, and far below what overflows in numpy.
MAX_ELEMENTS = 1 << 48

HEADER = struct.Struct("<4s6BH")
INDEX = np.dtype([("bytes", "<u4"), ("crc", "<u4")])
CRC_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """What a section says about its codes."""

    method: str
    dtype: np.dtype
    shape: tuple[int, ...]
    lanes_log2: int
    block_log2: int
    table: bytes

    @property
    def lanes(self) -> int:
        """Interleaved streams of each block."""
        return 1 << self.lanes_log2

    @property
    def block(self) -> int:
        """Symbols of each block but the last."""
        return 1 << self.block_log2

    @property
    def elements(self) -> int:
        """Number of codes."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Entries of the block index."""
        return 2 if self.method == "sparse" else -(-self.elements // self.block)


@dataclass(frozen=True)
class Section:
    """A section whose header and index have been checked, and its blocks, which have not."""

    layout: Layout
    payload: memoryview
    offsets: NDArray[np.uint64]
    crcs: NDArray[np.uint32]

    def part(self, index: int) -> memoryview:
        """The bytes of one block; :class:`~qkit.errors.InputError` if the checksum is wrong."""
        data = self.payload[int(self.offsets[index]) : int(self.offsets[index + 1])]
        if zlib.crc32(data) != self.crcs[index]:
            raise corrupt(f"the checksum of block {index} is wrong")
        return data


def corrupt(problem: str) -> InputError:
    """The error for bytes that are not a section."""
    return InputError(f"corrupt entropy-coded section: {problem}")


def write(layout: Layout, parts: Sequence[bytes]) -> bytes:
    """The section of these blocks."""
    if len(layout.shape) > MAX_DIMS or math.prod(max(n, 1) for n in layout.shape) > MAX_ELEMENTS:
        raise UsageError("too many dimensions or elements for a section", got=layout.shape)
    if any(len(part) >= 1 << 32 for part in parts):
        raise UsageError("a block of a section is smaller than 4 GiB")
    index = np.array([(len(part), zlib.crc32(part)) for part in parts], dtype=INDEX)
    head = b"".join(
        [
            HEADER.pack(
                MAGIC,
                VERSION,
                METHODS.index(layout.method),
                DTYPES.index(layout.dtype),
                len(layout.shape),
                layout.lanes_log2,
                layout.block_log2,
                len(layout.table),
            ),
            np.array(layout.shape, dtype="<u8").tobytes(),
            layout.table,
            index.tobytes(),
        ]
    )
    return b"".join([head, zlib.crc32(head).to_bytes(CRC_BYTES, "little"), *parts])


def read(data: memoryview) -> Section:
    """Check all but the blocks; :class:`~qkit.errors.InputError` if anything is not as stated."""
    if len(data) < HEADER.size:
        raise corrupt(f"{len(data)} bytes are less than a header")
    magic, version, method, dtype, dims, lanes, block, table = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise corrupt(f"it begins with {bytes(magic)!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise corrupt(f"version {version} is not known to this version of qkit")
    if method >= len(METHODS) or dtype >= len(DTYPES) or dims > MAX_DIMS:
        raise corrupt(f"method {method}, dtype {dtype}, {dims} dimensions")
    if lanes > MAX_LANES_LOG2 or block > MAX_BLOCK_LOG2:
        raise corrupt(f"2^{lanes} lanes, blocks of 2^{block}")
    at = HEADER.size + 8 * dims
    if len(data) < at + table:
        raise corrupt("it ends in its header")
    shape = struct.unpack_from(f"<{dims}Q", data, HEADER.size)
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise corrupt(f"shape {shape}")
    layout = Layout(
        METHODS[method], DTYPES[dtype], shape, lanes, block, bytes(data[at : at + table])
    )
    index_at = at + table
    head = index_at + INDEX.itemsize * layout.blocks
    if len(data) < head + CRC_BYTES:
        raise corrupt(f"it ends before the index of its {layout.blocks} blocks")
    if zlib.crc32(data[:head]) != int.from_bytes(data[head : head + CRC_BYTES], "little"):
        raise corrupt("the checksum of the header is wrong")
    index = np.frombuffer(data[index_at:head], dtype=INDEX)
    offsets = np.zeros(layout.blocks + 1, np.uint64)
    np.cumsum(index["bytes"], out=offsets[1:], dtype=np.uint64)
    payload = data[head + CRC_BYTES :]
    if len(payload) != offsets[-1]:
        raise corrupt(f"{len(payload)} bytes of blocks, {offsets[-1]} stated")
    return Section(layout, payload, offsets, index["crc"])
