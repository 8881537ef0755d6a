"""The operators in plain torch: complete, on any device, and the definition of correct.

A large weight is never a float matrix as a whole: it is dequantized and used a tile of rows at a
time, so that the extra memory of a call is one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qkit.numerics import dequantize_blocks, qparams_from_range
from qkit.numerics.blocks import block_range
from qkit.ops.schema import (
    check_act_qparams,
    check_acts,
    check_float,
    check_indices,
    check_levels,
    check_weight,
)
from qkit.packing import unpack
from qkit.spec import Int, PerToken, QSpec

# Values of one dequantized tile: 4 MiB of fp32, about a last-level cache's share of one core.
TILE_VALUES = 1 << 20


def rows_of(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """The float values of some rows of a stored weight: ``[rows, columns]``."""
    if weight.shape[0] * columns == 0:
        return weight.new_empty(weight.shape[0], columns, dtype=dtype)
    if bits == 8:
        codes = weight.reshape(-1, columns)
        codes = codes if levels is None else codes.view(torch.uint8)
    else:
        codes = unpack(weight, bits, columns, signed=levels is None)
    if levels is not None:
        # Not in a narrow dtype: level times scale is rounded once.
        codes = levels.to(torch.float64 if dtype == torch.float64 else torch.float32)[codes.long()]
    # A one-row scale above several rows is per tensor: then the rows are one block.
    block_rows = 1 if scale.shape[0] == codes.shape[0] else codes.shape[0]
    block = (block_rows, min(group, columns) if group else columns)
    return dequantize_blocks(codes, scale, zero_point, block, dtype)


def tiles(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a stored weight, dequantized a tile at a time."""
    rows, step = weight.shape[0], max(1, TILE_VALUES // max(columns, 1))
    per_tensor = scale.shape[0] != rows
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        of_scale = slice(None) if per_tensor else part
        zero = None if zero_point is None else zero_point[of_scale]
        values = weight[part], scale[of_scale], zero, bits, group, columns, dtype, levels
        yield part, rows_of(*values)


def work_dtype(x: Tensor) -> torch.dtype:
    """In what the products of ``x`` are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """``x @ W.T + bias`` with ``W`` dequantized: ``[..., K] -> [..., N]``."""
    check_float(x, "linear")
    columns, work = x.shape[-1], work_dtype(x)
    check_weight("linear", weight, scale, columns, bits, group)
    pieces = tiles(weight, scale, zero_point, bits, group, columns, work)
    return _product(x, _flat(x).to(work), pieces, weight.shape[0], bias)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _product(
    x: Tensor,
    rows: Tensor,
    tiles: Iterator[tuple[slice, Tensor]],
    outputs: int,
    bias: Tensor | None,
) -> Tensor:
    """``rows`` (what ``x`` became, as a matrix) times a weight in tiles, as a result for ``x``."""
    out = rows.new_empty(rows.shape[0], outputs)
    for part, tile in tiles:
        out[:, part] = rows @ tile.t()
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], outputs)


def linear_codebook(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """``linear`` with a weight of ``levels[code] * scale``."""
    check_float(x, "linear_codebook")
    columns, work = x.shape[-1], work_dtype(x)
    check_levels("linear_codebook", levels, bits)
    check_weight("linear_codebook", weight, scale, columns, bits, group)
    pieces = tiles(weight, scale, None, bits, group, columns, work, levels)
    return _product(x, _flat(x).to(work), pieces, weight.shape[0], bias)


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    act_bits: int,
    act_symmetric: bool,
    act_full: bool = False,
) -> Tensor:
    """``linear`` of ``x`` rounded to integers, a row at a time."""
    check_float(x, "linear_dynamic")
    check_acts("linear_dynamic", act_bits)
    fmt = Int(act_bits, narrow=act_symmetric and not act_full)
    spec = QSpec(fmt, PerToken(), act_symmetric, "dynamic")
    rows = _flat(x).to(work_dtype(x))
    finite = torch.isfinite(rows).all(1, keepdim=True)
    rows = torch.where(finite, rows, 0.0)
    params = qparams_from_range(*block_range(rows, (1, max(1, rows.shape[1]))), spec)
    rounded = _round(rows, params.scale, params.zero_point, fmt)
    rounded = torch.where(finite, rounded, torch.nan)
    columns, work = x.shape[-1], rows.dtype
    check_weight("linear_dynamic", weight, scale, columns, bits, group)
    pieces = tiles(weight, scale, zero_point, bits, group, columns, work)
    return _product(x, rounded, pieces, weight.shape[0], bias)


def _round(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Int) -> Tensor:
    """``x`` on the grid of an integer format: what :mod:`qkit.numerics.affine` quantizes to."""
    zero = 0 if zero_point is None else zero_point.to(x.dtype)
    scale = scale.to(x.dtype)
    return (((x / scale).round() + zero).clamp(fmt.qmin, fmt.qmax) - zero) * scale


def linear_static(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    act_bits: int,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
) -> Tensor:
    """``linear`` of ``x`` rounded to integers with a scale that is known."""
    check_float(x, "linear_static")
    check_acts("linear_static", act_bits)
    check_act_qparams(act_scale, act_zero_point)
    rows = _flat(x).to(work_dtype(x))
    finite = torch.isfinite(rows).all(1, keepdim=True)
    fmt = Int(act_bits, narrow=act_zero_point is None)
    zero = None if act_zero_point is None else act_zero_point.reshape(())
    rounded = torch.where(finite, _round(rows, act_scale.reshape(()), zero, fmt), torch.nan)
    columns, work = x.shape[-1], rows.dtype
    check_weight("linear_static", weight, scale, columns, bits, group)
    pieces = tiles(weight, scale, zero_point, bits, group, columns, work)
    return _product(x, rounded, pieces, weight.shape[0], bias)


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The whole float matrix ``[N, columns]``; for gradients and for inspection."""
    check_weight("dequantize", weight, scale, columns, bits, group)
    return rows_of(weight, scale, zero_point, bits, group, columns, dtype)


def dequantize_codebook(
    weight: Tensor,
    scale: Tensor,
    levels: Tensor,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The whole float matrix ``[N, columns]`` of a codebook weight."""
    check_levels("dequantize_codebook", levels, bits)
    check_weight("dequantize_codebook", weight, scale, columns, bits, group)
    return rows_of(weight, scale, None, bits, group, columns, dtype, levels)


def embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the float matrix, dequantized one by one: ``[...] -> [..., columns]``."""
    check_indices("embedding", indices)
    check_weight("embedding", weight, scale, columns, bits, group)
    rows, flat = weight.shape[0], indices.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise IndexError(f"qkit::embedding: an index is not one of the {rows} rows")
    flat = flat.long()
    per_tensor = scale.shape[0] != rows
    zero = zero_point if zero_point is None or per_tensor else zero_point[flat]
    scale = scale if per_tensor else scale[flat]
    values = rows_of(weight[flat], scale, zero, bits, group, columns, dtype)
    return values.reshape(*indices.shape, columns)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "linear_codebook": linear_codebook,
    "linear_dynamic": linear_dynamic,
    "linear_static": linear_static,
    "dequantize": dequantize,
    "dequantize_codebook": dequantize_codebook,
    "embedding": embedding,
}
