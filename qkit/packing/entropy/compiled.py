"""The compiled coders (``kernels/entropy.cpp``), called through ctypes, which releases the GIL.

They read and write the same bytes as ``huffman`` and ``ans``, which do the same in numpy where
there is no library.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.packing.entropy.section import Section, corrupt

# Of the codes in kernels/entropy.h.
OK, MEMORY = 0, 4

_POINTER, _U32, _U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
_TABLES: dict[str, list[Any]] = {"huffman": [_POINTER], "ans": [_POINTER, _U32]}
_ENCODE = [_U32, _U64, _POINTER, _U64, _U64, _U64, _POINTER, _U64, _POINTER]
_DECODE = [_U32, _U64, _POINTER, _U64, _POINTER, _U64, _U64, _POINTER, _U64]


class Coder(Protocol):
    """What Huffman and Ans have in common here."""

    @property
    def method(self) -> str:
        """The name of the method, which begins the names of its functions."""

    def arguments(self) -> tuple[Any, ...]:
        """The table, as its functions want it."""


def library() -> ctypes.CDLL | None:
    """The kernels, if they are there and have the entropy coders."""
    kernels = native.library()
    return kernels if hasattr(kernels, "qkit_entropy_bound") else None


def encode(
    kernels: ctypes.CDLL,
    coder: Coder,
    symbols: NDArray[np.uint8],
    block: int,
    lanes: int,
    first: int,
    last: int,
) -> list[bytes]:
    """The blocks ``first .. last - 1`` of flat, contiguous symbols."""
    bound = kernels.qkit_entropy_bound
    bound.argtypes, bound.restype = [_U64, _U32], _U64
    stride = bound(min(block, symbols.size), lanes)
    out = np.empty((last - first, stride), np.uint8)
    sizes = np.empty(last - first, np.uint64)
    function = getattr(kernels, f"qkit_{coder.method}_encode")
    function.argtypes, function.restype = [*_TABLES[coder.method], *_ENCODE], ctypes.c_int32
    status = function(
        *coder.arguments(),
        lanes,
        min(block, symbols.size),
        symbols.ctypes.data,
        symbols.size,
        first,
        last,
        out.ctypes.data,
        stride,
        sizes.ctypes.data,
    )
    if status == MEMORY:
        raise MemoryError
    if status != OK:
        raise RuntimeError(f"qkit_{coder.method}_encode returned {status}")
    return [out[i, : int(size)].tobytes() for i, size in enumerate(sizes)]


def decode(
    kernels: ctypes.CDLL,
    coder: Coder,
    section: Section,
    first: int,
    last: int,
    out: NDArray[np.uint8],
) -> None:
    """The blocks ``first .. last - 1`` of a section, into their places in ``out``."""
    payload = np.asarray(section.payload)
    function = getattr(kernels, f"qkit_{coder.method}_decode")
    function.argtypes, function.restype = [*_TABLES[coder.method], *_DECODE], ctypes.c_int32
    status = function(
        *coder.arguments(),
        section.layout.lanes,
        section.layout.block,
        payload.ctypes.data,
        payload.size,
        section.offsets.ctypes.data,
        first,
        last,
        out.ctypes.data,
        out.size,
    )
    if status == MEMORY:
        raise MemoryError
    if status != OK:
        raise corrupt("a block does not end where it should")
