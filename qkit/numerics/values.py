"""Formats that are a table of values: narrow floats and codebooks. The nearest value, and back.

A code is one byte. Of a float it is the bit pattern, so that ``codes.view(torch.float8_e4m3fn)``
is a tensor of values (an fp4 pattern is in the lower four bits); of a codebook it is the place
of the entry. The nearest value is exact: a quotient is compared with the midpoints between
neighbours, which are rounded down to its dtype, and no float lies between the two.

Floats round half to even (IEEE 754, section 4.3.1) and keep the sign of zero; what is too large
becomes the greatest finite value (OCP Microscaling Formats Specification 1.0, section 6.3). The
tie between two entries of a codebook goes to the lower one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qkit.spec import Codebook, Float


def midpoints(values: Tensor, dtype: torch.dtype, *, to_even: bool = False) -> Tensor:
    """Where the nearest of the ascending ``values`` (fp64, ``[..., n]``) changes, ``[..., n - 1]``.

    ``torch.bucketize(x, midpoints)`` is the place of the nearest value for ``x`` of ``dtype``; a
    tie goes to the lower place, or to the even one.
    """
    exact = values[..., :-1] / 2 + values[..., 1:] / 2
    rounded = exact.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    upwards = rounded.double() > exact
    if to_even:  # from an odd place, the tie goes up
        odd = torch.arange(exact.shape[-1], device=exact.device) % 2 == 1
        upwards |= odd & (rounded.double() == exact)
    return torch.where(upwards, below, rounded)


@cache
def _ascending(fmt: Float | Codebook) -> tuple[float, ...]:
    """The values that are searched: the entries, or the magnitudes of a float."""
    if isinstance(fmt, Codebook):
        return fmt.entries
    return tuple(map(fmt.value, range(fmt.top + 1)))


@cache
def by_code(fmt: Float | Codebook) -> tuple[float, ...]:
    """What each code stands for, in the order of the codes."""
    if isinstance(fmt, Codebook):
        return fmt.entries
    return tuple(map(fmt.value, range(1 << fmt.bits)))


def borders_of(fmt: Float | Codebook, like: Tensor) -> Tensor:
    """Where the nearest value of ``fmt`` changes, for numbers of the dtype and device of ``like``.

    Of a float, for their magnitudes.
    """
    values = torch.tensor(_ascending(fmt), dtype=torch.float64, device=like.device)
    return midpoints(values, like.dtype, to_even=isinstance(fmt, Float))


def encode(x: Tensor, fmt: Float | Codebook, borders: Tensor | None = None) -> Tensor:
    """The codes (uint8) of the values of ``fmt`` nearest to ``x`` (fp32 or fp64, any shape).

    ``x`` may be infinite, but not NaN. ``fmt`` has at most 8 bits. ``borders`` are those of
    :func:`borders_of`, for who encodes many small tensors.
    """
    signed = isinstance(fmt, Float)
    borders = borders_of(fmt, x) if borders is None else borders
    where = (x.abs() if signed else x).contiguous()  # torch warns otherwise
    codes = torch.bucketize(where, borders, out_int32=True).to(torch.uint8)
    if signed:
        codes += torch.signbit(x).to(torch.uint8) << (fmt.bits - 1)
    return codes


def decode(codes: Tensor, fmt: Float | Codebook, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of ``codes`` (uint8, any shape), without a scale, in ``dtype``."""
    values = torch.tensor(by_code(fmt), dtype=dtype, device=codes.device)
    return values.index_select(0, codes.flatten().int()).reshape(codes.shape)
