"""Writes the golden files: ``python tests/golden/make_golden.py`` (with qkit importable).

They pin the stored layout. A change in one of them is a change of the file format: artifacts
that users already have would be read differently.
"""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch

from qkit.numerics import choose_qparams, quantize
from qkit.packing import to_tensors
from qkit.spec import parse

HERE = Path(__file__).parent
SHAPES = {"linear": (6, 50), "conv": (4, 3, 3, 3)}
SCHEMES = [
    "w8a16",
    "w8a16-g16",
    "w8a16-tensor-asym",
    "w7a16-channel",
    "w6a16-g32",
    "w5a16-g16-asym",
    "w4a16-g32",
    "w4a16-g32-asym",
    "w4a16-tensor",
    "w3a16-channel",
    "w2a16-g16",
    "w1a16-g16-asym",
]


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Multiples of 1/64 in [-2, 2] from an integer formula: exact, and no random generator."""
    i = torch.arange(shape[0]).unsqueeze(1)
    j = torch.arange(math.prod(shape[1:])).unsqueeze(0)
    values = (37 * i + 101 * j + 7 * i * j + 5 * j * j) % 257 - 128
    return (values / 64).to(torch.float32).reshape(shape)


def stored(scheme: str) -> dict[str, torch.Tensor]:
    """What one golden file holds."""
    spec = parse(scheme).weight
    tensors = {}
    for name, shape in SHAPES.items():
        matrix = weight(shape).reshape(shape[0], -1)
        q = quantize(matrix, choose_qparams(matrix, spec), spec)
        tensors |= {f"{name}.{key}": value for key, value in to_tensors(q, shape).items()}
    return tensors


def golden_bytes(scheme: str) -> bytes:
    """The golden file of ``scheme`` as qkit writes it today."""
    return safetensors.torch.save(stored(scheme))


if __name__ == "__main__":
    for scheme in SCHEMES:
        (HERE / f"{scheme}.safetensors").write_bytes(golden_bytes(scheme))
