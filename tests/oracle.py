"""Slow, obvious oracles in plain Python and numpy; nothing here is computed as qkit computes it.

Blocks are explicit loops, bits are lists of 0 and 1, floats are rounded through ``math.frexp``,
the values of narrow floats are those of ml_dtypes.
Arrays are float32 or float64 (a bf16 or fp16 tensor is given as float32, which is exact).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int, ...]

# name: (significant bits, least exponent, greatest exponent) of the normal numbers
FLOATS = {
    "fp16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "fp32": (24, -126, 127),
    "fp12-e5m6": (7, -14, 15),
}


def round_up(value: float, dtype: str) -> float:
    """The least normal number of ``dtype`` that is at least ``value`` (not negative)."""
    digits, least, greatest = FLOATS[dtype]
    if value <= 2.0**least:
        return 2.0**least
    unit = 2.0 ** (math.frexp(value)[1] - digits)
    up = math.ceil(value / unit) * unit
    return up if up < 2.0 ** (greatest + 1) else math.inf


def blocks_of(shape: Shape, block_shape: Shape) -> Iterator[tuple[Shape, list[Shape]]]:
    """Every block's index and the indices of the elements inside it."""
    counts = [math.ceil(n / b) for n, b in zip(shape, block_shape, strict=True)]
    for block in itertools.product(*map(range, counts)):
        sides = [
            range(i * b, min((i + 1) * b, n))
            for i, b, n in zip(block, block_shape, shape, strict=True)
        ]
        yield block, list(itertools.product(*sides))


def quantize_oracle(
    x: NDArray, block_shape: Shape, qmin: int, qmax: int, symmetric: bool, scale_dtype: str
) -> tuple[NDArray, Array, NDArray | None]:
    """(codes, scale, zero point), value by value, with ranges and scales in float64.

    Quotients are taken in the dtype of ``x``, as the numerics state. Python's ``round`` is half
    to even.
    """
    count = tuple(math.ceil(n / b) for n, b in zip(x.shape, block_shape, strict=True))
    codes, scale = np.zeros(x.shape, np.int64), np.zeros(count)
    zero_point = np.zeros(count, np.int64)
    for block, inside in blocks_of(x.shape, block_shape):
        lo = min([0.0, *(float(x[i]) for i in inside)])
        hi = max([0.0, *(float(x[i]) for i in inside)])
        if not symmetric:
            exact, sign = (hi - lo) / (qmax - qmin), 1
        elif -qmin == qmax:
            exact, sign = max(-lo, hi) / qmax, 1
        elif -lo >= hi:  # the extra code, qmin, is for the greater side
            exact, sign = max(-lo / -qmin, hi / (qmax + 0.5)), 1
        else:
            exact, sign = max(hi / -qmin, -lo / (qmax + 0.5)), -1
        scale[block] = sign * round_up(exact, scale_dtype)
        if not symmetric:
            zero_point[block] = qmin - round(lo / scale[block])
        for i in inside:
            quotient = x[i] / x.dtype.type(scale[block])
            codes[i] = min(max(round(float(quotient)) + zero_point[block], qmin), qmax)
    return codes, scale, None if symmetric else zero_point


NARROW = {
    "fp8-e4m3": ml_dtypes.float8_e4m3fn,
    "fp8-e5m2": ml_dtypes.float8_e5m2,
    "fp4-e2m1": ml_dtypes.float4_e2m1fn,
}


def narrow_values(name: str) -> list[float]:
    """What each bit pattern of a narrow float stands for, infinity and NaN included."""
    patterns = np.arange(16 if name.startswith("fp4") else 256, dtype=np.uint8)
    return [float(value) for value in patterns.view(NARROW[name])]


def nearest_oracle(x: float, values: Sequence[float], *, floats: bool) -> int:
    """The index of the value nearest to ``x``; a tie goes to the even index, or the lower value.

    Of floats only those with the sign of ``x`` are looked at, so that the sign of zero stays.
    """
    same = [math.copysign(1, x) == math.copysign(1, v) or not floats for v in values]
    ascending = sorted((v, i) for i, v in enumerate(values) if math.isfinite(v) and same[i])
    at = bisect.bisect_left(ascending, (x, -1))
    near = ascending[max(at - 1, 0) : at + 1]
    tie = (lambda i: i % 2) if floats else (lambda i: i)
    return min(near, key=lambda pair: (abs(Fraction(x) - Fraction(pair[0])), tie(pair[1])))[1]


def quantize_table_oracle(
    x: NDArray, block_shape: Shape, values: Sequence[float], scale_dtype: str, *, floats: bool
) -> tuple[NDArray, Array]:
    """(codes, scale) of a format that is the list ``values``, by code."""
    count = tuple(math.ceil(n / b) for n, b in zip(x.shape, block_shape, strict=True))
    codes, scale = np.zeros(x.shape, np.int64), np.zeros(count)
    largest = max(abs(v) for v in values if math.isfinite(v))
    for block, inside in blocks_of(x.shape, block_shape):
        amax = max([0.0, *(abs(float(x[i])) for i in inside)])
        if scale_dtype != "e8m0":
            scale[block] = round_up(amax / largest, scale_dtype)
        elif amax == 0:
            scale[block] = 2.0**-127
        else:
            exponent = math.floor(math.log2(amax)) - math.floor(math.log2(largest))
            scale[block] = 2.0 ** max(exponent, -127)
        for i in inside:
            quotient = float(x[i] / x.dtype.type(scale[block]))
            codes[i] = nearest_oracle(quotient, values, floats=floats)
    return codes, scale


def dequantize_oracle(
    codes: NDArray, scale: NDArray, zero_point: NDArray | None, block_shape: Shape
) -> Array:
    """``(code - zero point) * scale``; exact, since 9 bits times 24 bits fit in a float64."""
    out = np.zeros(codes.shape)
    for block, inside in blocks_of(codes.shape, block_shape):
        zero = 0 if zero_point is None else int(zero_point[block])
        for i in inside:
            out[i] = (int(codes[i]) - zero) * float(scale[block])
    return out


def codebook_oracle(
    codes: NDArray, scale: NDArray, entries: Sequence[float], block_shape: Shape
) -> Array:
    """``entry of the code * scale`` with entries in fp32; exact in a float64."""
    levels, out = [float(np.float32(entry)) for entry in entries], np.zeros(codes.shape)
    for block, inside in blocks_of(codes.shape, block_shape):
        for i in inside:
            out[i] = levels[int(codes[i])] * float(scale[block])
    return out


def act_oracle(
    x: NDArray, bits: int, symmetric: bool, static: tuple[float, int] | None
) -> tuple[Array, Array]:
    """The rows ``x`` rounded to integers: (code - zero) * scale, and (|code| + |zero|) * scale.

    Each row has the scale of its own range, unless a ``static`` (scale, zero point) is given.
    """
    qmin, qmax = -(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1
    rows, columns = x.shape
    if static is None:
        codes, scale, zeros = quantize_oracle(x, (1, columns), qmin, qmax, symmetric, "fp32")
        zero = np.zeros((rows, 1)) if zeros is None else zeros
    else:
        scale = np.full((rows, 1), float(np.float32(static[0])))
        zero, codes = np.full((rows, 1), static[1]), np.zeros(x.shape, np.int64)
        for i in np.ndindex(x.shape):
            quotient = x[i] / x.dtype.type(scale[i[0], 0])
            codes[i] = min(max(round(float(quotient)) + static[1], qmin), qmax)
    return (codes - zero) * scale, (np.abs(codes) + np.abs(zero)) * scale


def pack_oracle(values: Sequence[int], bits: int, *, signed: bool = True) -> list[int]:
    """One row of codes as int32 words, by writing down every bit of the stream."""
    offset = 2 ** (bits - 1) if signed else 0
    stream = [(value + offset) >> k & 1 for value in values for k in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << k for k, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def unpack_oracle(words: Sequence[int], bits: int, n: int, *, signed: bool = True) -> list[int]:
    """The ``n`` codes of one row, read bit by bit."""
    offset = 2 ** (bits - 1) if signed else 0
    stream = [word >> k & 1 for word in words for k in range(32)]
    return [sum(stream[i * bits + k] << k for k in range(bits)) - offset for i in range(n)]


def linear_oracle(x: NDArray, weight: NDArray, bias: NDArray | None) -> tuple[Array, Array]:
    """``x @ weight.T + bias`` for a matrix ``x``, and the same of all absolute values.

    The second result is what the rounding errors of any summation order are proportional to.
    """
    out, size = np.zeros((len(x), len(weight))), np.zeros((len(x), len(weight)))
    for m, n in itertools.product(range(len(x)), range(len(weight))):
        terms = [float(a) * float(w) for a, w in zip(x[m], weight[n], strict=True)]
        terms.append(0.0 if bias is None else float(bias[n]))
        out[m, n], size[m, n] = math.fsum(terms), math.fsum(map(abs, terms))
    return out, size


def conv2d_oracle(
    x: NDArray,
    weight: NDArray,
    bias: NDArray | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Array, Array]:
    """The definition of a 2-D convolution, and the same of all absolute values."""
    batch, _, height, width = x.shape
    rows, channels, kh, kw = weight.shape
    out_h = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out, size = np.zeros((batch, rows, out_h, out_w)), np.zeros((batch, rows, out_h, out_w))
    for b, n, i, j in np.ndindex(out.shape):
        first = n // (rows // groups) * channels
        terms = [0.0 if bias is None else float(bias[n])]
        for c, u, v in np.ndindex(channels, kh, kw):
            h = i * stride[0] - padding[0] + u * dilation[0]
            w = j * stride[1] - padding[1] + v * dilation[1]
            if 0 <= h < height and 0 <= w < width:
                terms.append(float(x[b, first + c, h, w]) * float(weight[n, c, u, v]))
        out[b, n, i, j], size[b, n, i, j] = math.fsum(terms), math.fsum(map(abs, terms))
    return out, size
