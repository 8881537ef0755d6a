"""The stored layout of a quantized weight: a few plain tensors, independent of any kernel.

A weight of shape ``[rows, ...]`` is stored as a matrix ``[rows, columns]``, the trailing
dimensions flattened. With ``G = ceil(columns / group)`` (1 per channel; ``[1, 1]`` per tensor):

=======================  ======  ====================================================
``weight``               int8    the codes in the weight's own shape (8 bits only; uint8 of
                                 a codebook, and a narrow float is of its own type)
``weight_packed``        int32   ``[rows, ceil(columns * bits / 32)]``, see ``bits`` (1 to 7)
``weight_shape``         int64   the weight's own shape (with ``weight_packed`` only)
``weight_scale``         float   ``[rows, G]`` (not where the weight is only cast)
``weight_zero_point``    int8    ``[rows, G]`` (affine only)
``weight_levels``        fp32    ``[2^bits]``, what a code stands for (codebooks only)
``input_scale``          fp32    ``[1]`` (activations with a static range only)
``input_zero_point``     int8    ``[1]`` (the same, if affine)
=======================  ======  ====================================================

The names are those of the compressed-tensors formats ``int-quantized`` and ``pack-quantized``.

Rows are output channels. A transposed convolution's float weight, ``[in, out / groups, ...]``, has
them second, so it is stored *turned*, as ``[out, in / groups, ...]``: see :func:`turn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.numerics import QParams, QTensor, code_dtype, no_scale, scale_dtype
from qkit.numerics.values import by_code
from qkit.packing.bits import pack, packed_words, unpack
from qkit.spec import Codebook, Float, Int, QSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The shape and dtype of one stored tensor."""

    shape: Shape
    dtype: torch.dtype


def join(name: str, leaf: str) -> str:
    """The full name of ``leaf`` of the module ``name``; either may be empty."""
    return ".".join(filter(None, (name, leaf)))


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """``[rows, columns]`` of a weight of ``shape``."""
    return shape[0], math.prod(shape[1:])


def turn(weight: Tensor, groups: int) -> Tensor:
    """``[in, out / groups, ...]`` as ``[out, in / groups, ...]``, or the other way round.

    Channels of one group stay together; with one group it is a transposition.

    >>> turn(torch.empty(6, 2, 5), 3).shape
    torch.Size([6, 2, 5])
    >>> turn(torch.empty(6, 2, 5), 1).shape
    torch.Size([2, 6, 5])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _check_format(spec: QSpec) -> None:
    if not spec.by_table and not (isinstance(spec.format, Int) and spec.format.signed):
        raise TypeError(f"no codes of {spec.format} are stored")


def levels_of(fmt: Codebook | Float) -> Tensor:
    """What each code stands for, fp32 ``[2^bits]``; codes that a codebook lacks are 0."""
    values = by_code(fmt)
    return torch.tensor([*values, *[0.0] * ((1 << fmt.bits) - len(values))])


def _byte(fmt: Int | Codebook | Float) -> torch.dtype:
    """The dtype of stored codes of 8 bits."""
    if isinstance(fmt, Float):
        dtype: torch.dtype = getattr(torch, fmt.torch_name)
        return dtype
    return code_dtype(fmt)


def tensor_specs(shape: Shape, spec: QSpec, acts: QSpec | None = None) -> dict[str, Stored]:
    """Which tensors a weight of ``shape`` under ``spec`` is stored as.

    ``acts`` is how the layer quantizes its input; where its range is static, that is stored too.
    """
    rows, columns = matrix_shape(shape)
    _check_format(spec)
    fmt, bits = spec.format, spec.format.bits
    scale_shape = spec.granularity.scale_shape((rows, columns))
    stored = {} if spec.is_cast else {"weight_scale": Stored(scale_shape, scale_dtype(spec))}
    if not spec.symmetric:
        stored["weight_zero_point"] = Stored(scale_shape, torch.int8)
    if isinstance(fmt, Codebook):
        stored["weight_levels"] = Stored((1 << bits,), torch.float32)
    if acts is not None and acts.when == "static":
        stored["input_scale"] = Stored((1,), torch.float32)
        if not acts.symmetric:
            stored["input_zero_point"] = Stored((1,), torch.int8)
    if bits == 8:
        return {"weight": Stored(shape, _byte(fmt))} | stored
    packed = Stored((rows, packed_words(columns, bits)), torch.int32)
    return {
        "weight_packed": packed,
        "weight_shape": Stored((len(shape),), torch.int64),
    } | stored


def to_tensors(q: QTensor, shape: Shape) -> dict[str, Tensor]:
    """The tensors to store for the matrix ``q`` of a weight of ``shape``."""
    _check_format(q.spec)
    fmt, bits = q.spec.format, q.spec.format.bits
    tensors = {} if q.spec.is_cast else {"weight_scale": q.qparams.scale}
    if q.qparams.zero_point is not None:
        tensors["weight_zero_point"] = q.qparams.zero_point
    if isinstance(fmt, Codebook):
        tensors["weight_levels"] = levels_of(fmt)
    if bits == 8:
        return {"weight": q.codes.reshape(shape).view(_byte(fmt))} | tensors
    return {
        "weight_packed": pack(q.codes, bits),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    } | tensors


def from_tensors(tensors: Mapping[str, Tensor], spec: QSpec, *, name: str = "weight") -> QTensor:
    """The matrix ``[rows, columns]`` that :func:`to_tensors` stored.

    Raises :class:`~qkit.errors.InputError` if a tensor is missing or has another shape or dtype.
    """
    _check_format(spec)
    fmt, bits = spec.format, spec.format.bits
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
        codes = tensors["weight"].reshape(rows, columns).view(code_dtype(fmt))
    else:
        codes = unpack(tensors["weight_packed"], bits, columns, signed=isinstance(fmt, Int))
    if spec.is_cast:
        return QTensor(codes, no_scale(), spec)
    zero_point = None if spec.symmetric else tensors["weight_zero_point"]
    return QTensor(codes, QParams(tensors["weight_scale"], zero_point), spec)
