"""GPTQ: round one column after the other, and let the later columns make up for each error.

Frantar et al. 2023 (arXiv 2210.17323), by :mod:`qkit.algorithms.compensate`. Columns are taken
from the largest ``H[i, i]`` to the smallest (the paper's code calls that act-order); the scales
are those of the weight before any compensation, so that groups keep their order on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.algorithms.compensate import compensate, inverse_factor
from qkit.algorithms.stats import Stats
from qkit.numerics import QParams, QTensor, cast_codes, choose_qparams, code_dtype
from qkit.numerics.blocks import from_blocks, per_block, to_blocks
from qkit.numerics.values import borders_of, by_code, encode
from qkit.spec import Format, Int, QSpec


def gptq(weight: Tensor, spec: QSpec, stats: Stats, *, name: str = "weight") -> QTensor:
    """``weight`` ``[out, in]`` quantized by ``spec``, with the inputs' second moments in ``stats``.

    ``stats.moment`` is ``[groups, in, in]``; of a grouped convolution, each group's rows see
    their own inputs. Raises what :func:`qkit.algorithms.rtn` raises.
    """
    fmt = spec.format
    if spec.is_cast:
        qparams = cast_codes(weight, spec, name=name).qparams
    else:
        qparams = choose_qparams(weight, spec, name=name)
    scale, zero_point = per_value(qparams, spec, weight)
    groups = len(stats.moment)
    rows = zip(
        weight.float().chunk(groups),
        scale.float().chunk(groups),
        zero_point.float().chunk(groups),
        stats.moment,
        strict=True,
    )
    codes = torch.cat([_round(w, s, z, moment, fmt) for w, s, z, moment in rows])
    return QTensor(codes.to(code_dtype(fmt)), qparams, spec)


def per_value(qparams: QParams, spec: QSpec, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of each value of ``weight``."""
    shape = tuple(weight.shape)
    blocks = to_blocks(weight, spec.granularity.block_shape(shape))

    def spread(param: Tensor) -> Tensor:
        return from_blocks(per_block(param).expand(blocks.shape), shape)

    scale = spread(qparams.scale)
    return scale, torch.zeros_like(scale) if qparams.zero_point is None else spread(
        qparams.zero_point
    )


def _round(
    weight: Tensor, scale: Tensor, zero_point: Tensor, moment: Tensor, fmt: Format
) -> Tensor:
    """The codes of some rows, all of which see inputs with the same ``moment``."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moment[order][:, order])
    weight, scale, zero_point = (t[:, order].contiguous() for t in (weight, scale, zero_point))
    codes = torch.empty_like(weight)
    table: tuple[Tensor, ...] = ()
    if not isinstance(fmt, Int):  # once, not for every column
        table = borders_of(fmt, weight), torch.tensor(by_code(fmt)).to(weight)

    def replace(at: int, column: Tensor) -> Tensor:
        codes[:, at], value = _nearest(column / scale[:, at], zero_point[:, at], fmt, table)
        return value * scale[:, at]

    compensate(weight, factor, replace)
    return codes[:, order.argsort()]


def _nearest(
    x: Tensor, zero_point: Tensor, fmt: Format, table: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The codes nearest to ``x`` (a weight over its scale), and what they stand for.

    ``table`` holds the borders and the values of a ``fmt`` that is not an integer.
    """
    if isinstance(fmt, Int):
        codes = x.round_().add_(zero_point).clamp_(fmt.qmin, fmt.qmax)
        return codes, codes - zero_point
    borders, levels = table
    found = encode(x, fmt, borders)
    return found.to(x.dtype), levels[found.int()]
