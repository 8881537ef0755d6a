"""Quantization with a scale: the one formula of qkit, for any format and any block shape.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x' = (q - zero_point) * scale

for integers, and for narrow floats and codebooks (:mod:`qkit.numerics.values`)

    q = the code of the value nearest to x / scale              x' = value(q) * scale

Rounding is half to even. Symmetric formats have no zero point. This is the formula of
Jacob et al. 2018 (arXiv 1712.05877, section 2.1) with these choices, which live here and
nowhere else:

* Every range is widened to contain zero, so that zero is exact and a block of values in
  [10, 11] is covered by [0, 11] instead of being clamped to nonsense.
* The exact scale is ``max(-lo, hi) / qmax`` (symmetric, narrow), ``(hi - lo) / (qmax - qmin)``
  (affine) or ``max(-lo, hi) / greatest magnitude`` (float, codebook), computed in float64 and
  then rounded *up* to the format in which it is stored. Codes are computed with the stored
  scale. So nothing inside the range is ever clipped by more than the rounding of the zero point,
  and ``|x' - x| <= |scale| / 2`` holds for every x in the range.
* A full symmetric range has one more code below zero than above. In a weight that code goes to the
  side of the greatest magnitude: the scale is *negative* where that is the positive side. With
  ``a`` the greater and ``b`` the lesser of -lo and hi, ``|scale| = max(a / -qmin, b / (qmax +
  1/2))``. (Of 4 bits that is up to 1/8 finer than the narrow range: 1.2 dB for nothing.) In
  activations that are quantized at each call both sides are alike: ``max(-lo, hi) / ((qmax - qmin)
  / 2)``, of 8 bits ``/ 127.5``, rounded to *nearest*, because the greatest value is then a tie,
  which may lose half a step. That is how compressed-tensors reads its format.
* A scale's magnitude is at least the smallest normal number of its format. A block of zeros (or
  of denormal numbers that small) has that scale and codes that are exactly zero (or nearly so).
* The zero point is ``qmin - round(lo / scale)``: always inside [qmin, qmax].
* An e8m0 scale is that of the microscaling formats: ``2^(floor(log2(max(-lo, hi))) - emax)``, with
  ``emax`` the exponent of the greatest value of the element format, and at least 2^-127 (OCP
  Microscaling Formats Specification 1.0, section 6.3). It may be too small by less than a factor
  of two for the greatest values of a block, which then saturate.
* NaN and infinity are refused by :func:`check_finite`; a range that overflows the scale's format
  is refused too.
* fp16, bf16 and fp32 values are divided in fp32, fp64 values in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.numerics import fast
from qkit.numerics.blocks import block_range, from_blocks, per_block, to_blocks
from qkit.numerics.tensors import QParams, QTensor, check_out, into
from qkit.numerics.values import decode, encode
from qkit.spec import E8M0, FP12_E5M6, FP16, FP32, Float, Format, Int, QSpec


def check_finite(x: Tensor, name: str) -> None:
    """Raise :class:`~qkit.errors.InputError`, with counts, if ``x`` holds NaN or infinity."""
    _check_real(x, name)
    x = x.float() if x.element_size() == 1 else x  # torch does not look for infinity in all fp8
    # A sum is finite only if every term is: one cheap pass, and no mask in the common case. (The
    # sum of finite values may overflow; then they are counted.)
    if torch.isfinite(x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)):
        return
    nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    if nan or inf:
        raise InputError(
            "the tensor is not finite",
            where=name,
            got=f"{nan} NaN and {inf} infinite of {x.numel()} values",
            fix="repair or retrain the checkpoint; quantizing it would hide the damage",
        )


def _check_real(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise InputError("only real floating-point tensors are quantized", where=name, got=x.dtype)


def _work(x: Tensor) -> Tensor:
    """``x`` in the dtype in which it is divided."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _round_up(x: Tensor, dtype: torch.dtype, unused: int = 0) -> Tensor:
    """The smallest normal number of ``dtype`` that is at least ``x`` (float64, not negative).

    The last ``unused`` bits of its mantissa are zero.
    """
    y = x.to(dtype)
    bits = y.view(torch.int32 if y.element_size() == 4 else torch.int16)
    # The bits of a number that is not negative, plus one (the last used), are those of the next.
    bits = bits - bits % (1 << unused)
    up = (bits.view(dtype).double() < x).to(bits.dtype) << unused
    return (bits + up).view(dtype).clamp(min=torch.finfo(dtype).tiny)


def _shared_exponent(amax: Tensor, fmt: Float) -> Tensor:
    """The exact scale of a microscaling block with the greatest magnitude ``amax`` (float64)."""
    power = amax / (2 * torch.frexp(amax).mantissa)  # exact; NaN for a block of zeros
    return torch.where(amax > 0, power / 2.0**fmt.emax, 0.0).clamp(min=E8M0.smallest)


def choose_qparams(x: Tensor, spec: QSpec, *, name: str = "tensor") -> QParams:
    """Scale and zero point of each block of ``x`` from its least and greatest value.

    ``x`` has any shape and float dtype; the result has ``spec.granularity.scale_shape(x.shape)``.
    ``name`` is for messages. Raises :class:`~qkit.errors.InputError` if ``x`` is not finite.
    """
    _check_real(x, name)
    lo, hi = block_range(x, spec.granularity.block_shape(tuple(x.shape)))
    if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):  # a range shows what x holds
        check_finite(x, name)
    return qparams_from_range(lo, hi, spec, name=name)


def qparams_from_range(lo: Tensor, hi: Tensor, spec: QSpec, *, name: str = "tensor") -> QParams:
    """Scale and zero point for the ranges ``[lo, hi]``, one for each element; ``lo <= 0 <= hi``.

    Raises :class:`~qkit.errors.InputError` for a range that overflows the scale or fp32.
    """
    fmt = spec.format
    dtype = scale_dtype(spec)
    low, below, high = lo.double(), -lo.double(), hi.double()
    if isinstance(fmt, Float) and spec.scale == E8M0:
        exact = _shared_exponent(torch.maximum(below, high), fmt)
    elif not isinstance(fmt, Int):
        exact = torch.maximum(below, high) / fmt.max
    elif spec.symmetric and fmt.narrow:
        exact = torch.maximum(below, high) / fmt.qmax
    elif spec.symmetric and spec.when == "dynamic":
        exact = torch.maximum(below, high) / ((fmt.qmax - fmt.qmin) / 2)
        return QParams(exact.to(dtype).clamp(min=torch.finfo(dtype).tiny))
    elif spec.symmetric:
        greater, lesser = torch.maximum(below, high), torch.minimum(below, high)
        exact = torch.maximum(greater / -fmt.qmin, lesser / (fmt.qmax + 0.5))
    else:
        exact = (high - low) / (fmt.qmax - fmt.qmin)
    unused = FP16.mantissa - FP12_E5M6.mantissa if spec.scale == FP12_E5M6 else 0
    scale = exact.to(dtype) if spec.scale == E8M0 else _round_up(exact, dtype, unused)
    wide = scale.double()
    if not isinstance(fmt, Int):
        _check_outermost(exact, wide, fmt.max, spec, name)
        return QParams(scale)
    if spec.symmetric:
        _check_outermost(exact, wide, max(fmt.qmax, -fmt.qmin), spec, name)
        return QParams(scale if fmt.narrow else torch.where(high > below, -scale, scale))
    zero_point = (fmt.qmin - torch.round(low / wide)).clamp(fmt.qmin, fmt.qmax)
    farthest = torch.maximum(fmt.qmax - zero_point, zero_point - fmt.qmin)
    _check_outermost(exact, wide, farthest, spec, name)
    return QParams(scale, zero_point.to(code_dtype(fmt)))


def _check_outermost(
    exact: Tensor, stored: Tensor, code: Tensor | float, spec: QSpec, name: str
) -> None:
    """The outermost code may stand for more than the greatest value; it must stay a number."""
    if torch.isfinite((stored * code).float()).all():  # torch holds every e8m0 for finite
        return
    what = "fp32" if torch.isfinite(stored).all() else f"the {spec.scale} scale"
    reach = float((exact * code).max())
    raise InputError(f"the range overflows {what}", where=name, got=f"{reach:g}")


def scale_dtype(spec: QSpec) -> torch.dtype:
    """The dtype of a stored scale; ``TypeError`` for a cast, which has none."""
    if spec.scale is None:
        raise TypeError(f"{spec.format} has no scale: cast it (qkit.numerics.cast)")
    name = FP16.torch_name if spec.scale == FP12_E5M6 else spec.scale.torch_name
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def code_dtype(fmt: Format) -> torch.dtype:
    """The dtype of unpacked codes, one byte each: int8 for signed integers, else uint8."""
    return torch.int8 if isinstance(fmt, Int) and fmt.signed else torch.uint8


def quantize(x: Tensor, qparams: QParams, spec: QSpec, *, out: Tensor | None = None) -> QTensor:
    """The codes of ``x``, of the same shape. ``x`` must be finite (:func:`check_finite`).

    ``out`` is memory for the codes (:func:`code_dtype`), contiguous; without it they get new
    memory, whose pages the system first has to clear: that takes longer than the arithmetic.
    """
    fmt, shape = spec.format, tuple(x.shape)
    if spec.is_cast:
        raise TypeError(f"{fmt} has no codes: cast it (qkit.numerics.cast)")
    check_out(out, shape, code_dtype(fmt))
    x, block_shape = _work(x), spec.granularity.block_shape(shape)
    if isinstance(fmt, Int) and fmt.signed:
        scale, zero_point = qparams.scale, qparams.zero_point
        by_kernel = fast.quantize(x, scale, zero_point, block_shape, fmt.qmin, fmt.qmax, out)
        if by_kernel is not None:
            return QTensor(by_kernel, qparams, spec)
    blocks = to_blocks(x, block_shape)
    codes = blocks / per_block(qparams.scale).to(blocks.dtype)
    if isinstance(fmt, Int):
        codes.round_()
        if qparams.zero_point is not None:
            codes += per_block(qparams.zero_point)
        codes = codes.clamp_(fmt.qmin, fmt.qmax).to(code_dtype(fmt))
    else:
        codes = encode(codes, fmt)
    return QTensor(into(out, from_blocks(codes, shape)), qparams, spec)


def quantize_minmax(
    x: Tensor, spec: QSpec, *, name: str = "tensor", out: Tensor | None = None
) -> QTensor:
    """``quantize(x, choose_qparams(x, spec, name=name), spec, out=out)``, bit for bit.

    The range of each block is its least and greatest value. By the kernels, ``x`` is read once.
    """
    fmt, shape = spec.format, tuple(x.shape)
    if isinstance(fmt, Int) and fmt.signed and spec.scale == FP32:
        check_out(out, shape, torch.int8)
        block_shape = spec.granularity.block_shape(shape)
        found = fast.quantize_minmax(
            x, block_shape, fmt.qmin, fmt.qmax, affine=not spec.symmetric, out=out
        )
        if found is not None:
            codes, scale, zero_point = found
            return QTensor(codes, QParams(scale, zero_point), spec)
    return quantize(x, choose_qparams(x, spec, name=name), spec, out=out)


def dequantize(
    q: QTensor, dtype: torch.dtype = torch.float32, *, out: Tensor | None = None
) -> Tensor:
    """The values of ``q``: ``(code - zero_point) * scale``, or ``value(code) * scale``.

    Computed in fp32 (fp64 for fp64); the result has the shape of ``q``. ``out`` is memory for it
    (see :func:`quantize`).
    """
    block_shape, codes, fmt = q.spec.granularity.block_shape(q.shape), q.codes, q.spec.format
    if not isinstance(fmt, Int):
        codes = decode(codes, fmt, torch.float64 if dtype == torch.float64 else torch.float32)
    scale, zero_point = q.qparams.scale, q.qparams.zero_point
    return dequantize_blocks(codes, scale, zero_point, block_shape, dtype, out=out)


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`dequantize` for callers that hold a block shape instead of a spec (kernels do)."""
    check_out(out, tuple(codes.shape), dtype)
    if dtype != torch.float64:
        wide = out if dtype == torch.float32 else None
        by_kernel = fast.dequantize(codes, scale, zero_point, block_shape, wide)
        if by_kernel is not None:
            return by_kernel if by_kernel is out else into(out, by_kernel.to(dtype))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = to_blocks(codes, block_shape).to(work)
    if zero_point is not None:
        blocks = blocks - per_block(zero_point).to(work)
    values = from_blocks(blocks * per_block(scale).to(work), tuple(codes.shape))
    return into(out, values.to(dtype))
