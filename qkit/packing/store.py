"""The stored layout of a quantized weight: a few plain tensors, independent of any kernel.

A weight of shape ``[rows, ...]`` is stored as a matrix ``[rows, columns]``, the trailing
dimensions flattened. With ``G = ceil(columns / group)`` (1 per channel; ``[1, 1]`` per tensor):

=======================  ======  ====================================================
``weight``               int8    the codes in the weight's own shape (8 bits only)
``weight_packed``        int32   ``[rows, ceil(columns * bits / 32)]``, see ``bits`` (1 to 7)
``weight_shape``         int64   the weight's own shape (with ``weight_packed`` only)
``weight_scale``         float   ``[rows, G]``
``weight_zero_point``    int8    ``[rows, G]`` (affine only)
=======================  ======  ====================================================

The names are those of the compressed-tensors formats ``int-quantized`` and ``pack-quantized``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.numerics import QParams, QTensor, scale_dtype
from qkit.packing.bits import pack, packed_words, unpack
from qkit.spec import Int, QSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The shape and dtype of one stored tensor."""

    shape: Shape
    dtype: torch.dtype


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """``[rows, columns]`` of a weight of ``shape``."""
    return shape[0], math.prod(shape[1:])


def _format(spec: QSpec) -> Int:
    if not isinstance(spec.format, Int) or not spec.format.signed:
        raise TypeError(f"only signed integers are stored as codes, not {spec.format}")
    return spec.format


def tensor_specs(shape: Shape, spec: QSpec) -> dict[str, Stored]:
    """Which tensors a weight of ``shape`` under ``spec`` is stored as."""
    rows, columns = matrix_shape(shape)
    bits = _format(spec).bits
    scale_shape = spec.granularity.scale_shape((rows, columns))
    stored = {"weight_scale": Stored(scale_shape, scale_dtype(spec))}
    if not spec.symmetric:
        stored["weight_zero_point"] = Stored(scale_shape, torch.int8)
    if bits == 8:
        return {"weight": Stored(shape, torch.int8)} | stored
    packed = Stored((rows, packed_words(columns, bits)), torch.int32)
    return {
        "weight_packed": packed,
        "weight_shape": Stored((len(shape),), torch.int64),
    } | stored


def to_tensors(q: QTensor, shape: Shape) -> dict[str, Tensor]:
    """The tensors to store for the matrix ``q`` of a weight of ``shape``."""
    bits = _format(q.spec).bits
    tensors = {"weight_scale": q.qparams.scale}
    if q.qparams.zero_point is not None:
        tensors["weight_zero_point"] = q.qparams.zero_point
    if bits == 8:
        return {"weight": q.codes.reshape(shape)} | tensors
    return {
        "weight_packed": pack(q.codes, bits),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    } | tensors


def from_tensors(tensors: Mapping[str, Tensor], spec: QSpec, *, name: str = "weight") -> QTensor:
    """The matrix ``[rows, columns]`` that :func:`to_tensors` stored.

    Raises :class:`~qkit.errors.InputError` if a tensor is missing or has another shape or dtype.
    """
    bits = _format(spec).bits
    key = "weight" if bits == 8 else "weight_shape"
    if key not in tensors:
        raise InputError(f"the artifact lacks {key!r}", where=name, got=", ".join(sorted(tensors)))
    stated = tensors[key]
    good = stated.ndim > 0 if bits == 8 else stated.ndim == 1 and stated.numel() > 0
    if not good:
        raise InputError(
            f"the stored tensor {key!r} is not that of a weight",
            where=name,
            got=f"{stated.dtype} {tuple(stated.shape)}",
        )
    shape = tuple(stated.shape if bits == 8 else stated.tolist())
    for key, want in tensor_specs(shape, spec).items():
        have = tensors.get(key)
        if have is None or (tuple(have.shape), have.dtype) != (want.shape, want.dtype):
            raise InputError(
                f"the stored tensor {key!r} does not fit the scheme",
                where=name,
                got="nothing" if have is None else f"{have.dtype} {tuple(have.shape)}",
                wanted=f"{want.dtype} {want.shape}",
            )
    rows, columns = matrix_shape(shape)
    if bits == 8:
        codes = tensors["weight"].reshape(rows, columns)
    else:
        codes = unpack(tensors["weight_packed"], bits, columns)
    zero_point = None if spec.symmetric else tensors["weight_zero_point"]
    return QTensor(codes, QParams(tensors["weight_scale"], zero_point), spec)
