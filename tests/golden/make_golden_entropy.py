"""Writes the golden sections: ``python tests/golden/make_golden_entropy.py``.

They pin the bytes of entropy-coded sections: the format that a reader must understand
(``qkit/packing/entropy/section.py``), and the choices that the encoder makes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.packing import entropy

HERE = Path(__file__).parent


def bell(n: int) -> NDArray[np.int8]:
    """4-bit codes from an integer formula, bell-shaped as the sum of three residues."""
    i = np.arange(n, dtype=np.int64)
    return ((7 * i % 5 + i * i % 7 + (i * i * i + 3 * i) % 6) - 8).astype(np.int8)


def pruned(n: int) -> NDArray[np.int8]:
    """The same, but zero except near every 61st place, with a long run of zeros."""
    i = np.arange(n)
    return np.where((i * i % 61 < 3) & (i // 1000 != 1), bell(n) | 1, 0).astype(np.int8)


# name: codes, method, log2 of the block size
CASES = {
    "raw": (bell(100).reshape(4, 25), "raw", 6),
    "huffman": (bell(2500).reshape(50, 50), "huffman", 11),
    "ans": (bell(2500).reshape(50, 50), "ans", 11),
    "ans-uint8": (np.arange(3000).astype(np.uint8) // 3, "ans", 12),
    "sparse": (pruned(6000).reshape(2, 30, 100), "sparse", 16),
    "constant": (np.full(5, 200, np.uint8), "huffman", 16),
    "scalar": (np.array(-3, np.int8), "ans", 16),
    "empty": (np.zeros((3, 0), np.int8), "auto", 16),
}


def golden_bytes(name: str) -> bytes:
    """The golden section as qkit writes it today."""
    codes, method, block_log2 = CASES[name]
    return entropy.encode(codes, method, block_log2=block_log2)


def path(name: str) -> Path:
    """Where the golden section is."""
    return HERE / f"entropy-{name}.qent"


if __name__ == "__main__":
    for name in CASES:
        path(name).write_bytes(golden_bytes(name))
