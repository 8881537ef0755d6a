"""The values that numerics hands around: ``QParams`` and ``QTensor``. Not tensor subclasses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.spec import QSpec


@dataclass(frozen=True, eq=False)
class QParams:
    """``scale`` (a float tensor) and ``zero_point`` (int8 or uint8, or ``None`` where symmetric).

    Both have the shape ``granularity.scale_shape(x.shape)``. The scale of a full symmetric range
    may be negative.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def no_scale() -> QParams:
    """Those of a tensor that is only cast: a scale of one, which is not stored."""
    return QParams(torch.ones(1, 1))


@dataclass(frozen=True, eq=False)
class QTensor:
    """Quantized numbers, unpacked: one int8 (or uint8) code for each value of ``codes``' shape.

    The value of an integer code is ``(code - zero_point) * scale``, that of any other
    ``value(code) * scale`` (:mod:`qkit.numerics.values`).
    """

    codes: Tensor
    qparams: QParams
    spec: QSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that was quantized."""
        return tuple(self.codes.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and zero points included, per value."""
        bits = self.codes.numel() * self.spec.format.bits
        for param in (self.qparams.scale, self.qparams.zero_point):
            if param is not None and not self.spec.is_cast:
                bits += param.numel() * param.element_size() * 8
        return bits / max(self.codes.numel(), 1)


def check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`~qkit.errors.UsageError` if a result does not fit in ``out``, where given."""
    if out is None or (out.shape == shape and out.dtype == dtype and out.is_contiguous()):
        return
    raise UsageError(
        "the result does not fit in out",
        got=f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}",
        wanted=f"{dtype} {tuple(shape)}, contiguous",
    )


def into(out: Tensor | None, result: Tensor) -> Tensor:
    """``result``, copied to ``out`` where that is given (:func:`check_out`)."""
    return result if out is None else out.copy_(result)
