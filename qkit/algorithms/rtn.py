"""Round to nearest: the range of each block is its least and greatest value. Needs no data."""

from __future__ import annotations

from torch import Tensor

from qkit.numerics import QTensor, quantize_minmax
from qkit.spec import QSpec


def rtn(weight: Tensor, spec: QSpec, *, name: str = "weight") -> QTensor:
    """``weight`` ``[out, in]`` quantized by ``spec``, each value to the nearest code.

    Raises :class:`~qkit.errors.InputError`, naming ``name``, if a value is not finite.
    """
    return quantize_minmax(weight, spec, name=name)
