"""The operators in plain torch: complete, on any device, and the definition of correct.

A large weight is never a float matrix as a whole: it is dequantized and used a tile of rows at a
time, so that the extra memory of a call is one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.numerics import dequantize_blocks
from qkit.ops.schema import check_float, check_weight
from qkit.packing import unpack

# Values of one dequantized tile: 4 MiB of fp32, about a last-level cache's share of one core.
TILE_VALUES = 1 << 20


def _rows(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The float values of some rows of a stored weight: ``[rows, columns]``."""
    if columns == 0:
        return weight.new_empty(weight.shape[0], 0, dtype=dtype)
    codes = weight.reshape(-1, columns) if bits == 8 else unpack(weight, bits, columns)
    # A one-row scale above several rows is per tensor: then the rows are one block.
    block_rows = 1 if scale.shape[0] == codes.shape[0] else codes.shape[0]
    block = (block_rows, min(group, columns) if group else columns)
    return dequantize_blocks(codes, scale, zero_point, block, dtype)


def _tiles(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a stored weight, dequantized a tile at a time."""
    rows, step = weight.shape[0], max(1, TILE_VALUES // max(columns, 1))
    per_tensor = scale.shape[0] != rows
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        of_scale = slice(None) if per_tensor else part
        zero = None if zero_point is None else zero_point[of_scale]
        yield part, _rows(weight[part], scale[of_scale], zero, bits, group, columns, dtype)


def _work(x: Tensor) -> torch.dtype:
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
    columns, work = x.shape[-1], _work(x)
    check_weight("linear", weight, scale, columns, bits, group)
    rows = x.reshape(math.prod(x.shape[:-1]), columns).to(work)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for part, tile in _tiles(weight, scale, zero_point, bits, group, columns, work):
        out[:, part] = rows @ tile.t()
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """torch's ``conv2d`` of ``x`` with the dequantized weight."""
    check_float(x, "conv2d")
    channels, work = x.shape[-3] // groups, _work(x)
    columns = channels * kernel[0] * kernel[1]
    check_weight("conv2d", weight, scale, columns, bits, group)
    wide, bias = x.to(work), None if bias is None else bias.to(work)

    def run(rows: Tensor, part: slice) -> Tensor:
        bias_part = None if bias is None else bias[part]
        tile = rows.reshape(-1, channels, *kernel)
        return F.conv2d(wide, tile, bias_part, stride, padding, dilation, groups)

    if groups > 1 or weight.shape[0] * columns <= TILE_VALUES:
        # A grouped convolution cannot be cut by rows, and its weight is small.
        rows = _rows(weight, scale, zero_point, bits, group, columns, work)
        return run(rows, slice(None)).to(x.dtype)
    tiles = _tiles(weight, scale, zero_point, bits, group, columns, work)
    return torch.cat([run(rows, part) for part, rows in tiles], dim=-3).to(x.dtype)


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
    return _rows(weight, scale, zero_point, bits, group, columns, dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "conv2d": conv2d,
    "dequantize": dequantize,
}
