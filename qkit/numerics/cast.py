"""Casting to a narrower float, with its error accounted for.

Rounding is half to even (IEEE 754, section 4.3.1), to subnormal numbers too. A value overflows if
it would with an unbounded exponent round to more than the format's greatest finite value: that is
refused, also where torch saturates because the format has no infinity (fp8-e4m3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import RequestError
from qkit.numerics.affine import check_finite
from qkit.numerics.tensors import QTensor, no_scale
from qkit.spec import FP32, Float, QSpec


@dataclass(frozen=True)
class CastLoss:
    """What a cast did to one tensor.

    ``overflow`` counts the values that are too large, ``underflow`` those that became zero
    although they were not; ``max_error`` is the greatest ``|cast(x) - x|``.
    """

    overflow: int
    underflow: int
    max_error: float = 0.0

    def __add__(self, other: CastLoss) -> CastLoss:
        """What the casts of two parts of one tensor did."""
        return CastLoss(
            self.overflow + other.overflow,
            self.underflow + other.underflow,
            max(self.max_error, other.max_error),
        )


def _to_odd(x: Tensor, fmt: Float) -> Tensor:
    """fp64 made fp32 by rounding to odd, so that rounding that to ``fmt`` rounds ``x`` only once.

    torch casts fp64 to a 16-bit type through fp32, and half to even twice is not half to even.
    """
    if x.dtype != torch.float64 or fmt == FP32:
        return x
    y = x.to(torch.float32)
    beyond = torch.where(x > y.double(), torch.inf, -torch.inf).to(torch.float32)
    inexact_even = (y.double() != x) & (y.view(torch.int32) % 2 == 0)
    return torch.where(inexact_even, torch.nextafter(y, beyond), y)


def _overflows(x: Tensor, y: Tensor, fmt: Float) -> int:
    """How many values of ``x`` are too large for ``fmt``, to which they were cast as ``y``."""
    if fmt.has_inf:
        return int(torch.isinf(y.float()).sum())
    half_step = 2.0 ** (fmt.emax - fmt.mantissa - 1)
    return int((x.abs() > fmt.max + half_step).sum())  # the greatest pattern is even: it wins ties


def cast(x: Tensor, fmt: Float, *, name: str = "tensor") -> tuple[Tensor, CastLoss]:
    """``x`` (any shape and float dtype) rounded half to even to ``fmt``, and what that lost.

    Raises :class:`~qkit.errors.InputError` if ``x`` is not finite, and
    :class:`~qkit.errors.RequestError` with the count if values are too large for ``fmt``: an
    infinite or saturated weight is not an approximation. ``TypeError`` if torch has no such type.
    """
    if not fmt.signed:
        raise TypeError(f"{fmt} is for scales, not for values")
    dtype = getattr(torch, fmt.torch_name)
    check_finite(x, name)
    x = x.float() if x.element_size() == 1 else x  # torch compares no fp8
    y = _to_odd(x, fmt).to(dtype)
    overflow = _overflows(x, y, fmt)
    if overflow:
        raise RequestError(
            f"values are too large for {fmt}",
            where=name,
            got=f"{overflow} of {x.numel()}, the largest {float(x.abs().max()):g}",
            wanted=f"at most {fmt.max:g}",
            fix="--scheme bf16 has the range of fp32"
            + (f", {fmt}-channel has scales" if fmt.bits == 8 else ""),
        )
    wide = y.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    error = float((wide - x).abs().max()) if x.numel() else 0.0
    return y, CastLoss(overflow, int(((wide == 0) & (x != 0)).sum()), error)


def cast_codes(x: Tensor, spec: QSpec, *, name: str = "tensor") -> QTensor:
    """``x`` cast to the 8-bit float of ``spec``, its bit patterns as codes and a scale of one.

    Raises what :func:`cast` raises.
    """
    assert isinstance(spec.format, Float)
    y, _ = cast(x, spec.format, name=name)
    return QTensor(y.view(torch.uint8), no_scale(), spec)
