"""Round to nearest: the range of each block is its least and greatest value. Needs no data."""

from __future__ import annotations

from torch import Tensor

from qkit.numerics import QTensor, cast_codes, quantize_minmax
from qkit.spec import QSpec


def rtn(weight: Tensor, spec: QSpec, *, name: str = "weight") -> QTensor:
    """``weight`` ``[out, in]`` quantized by ``spec``, each value to the nearest code.

    A spec without a scale casts: see :func:`qkit.numerics.cast`.

    Raises :class:`~qkit.errors.InputError`, naming ``name``, if a value is not finite.
    """
    if spec.is_cast:
        return cast_codes(weight, spec, name=name)
    return quantize_minmax(weight, spec, name=name)
