"""GPTQ: round one column after the other, and let the later columns make up for each error.

For the layer ``y = W x`` the error of the outputs is ``tr((W - Q) H (W - Q)^T)`` with
``H = E[x x^T]``. Rounding column ``i`` of ``W`` by ``e_i`` is compensated best by adding
``-e_i U[i, j] / U[i, i]`` to each later column ``j``, where ``U`` is the upper Cholesky factor of
``H^-1``: Frantar et al. 2023 (arXiv 2210.17323), steps 1 to 3 and algorithm 1. Columns are taken
from the largest ``H[i, i]`` to the smallest (the paper's code calls that act-order); the scales
are those of the weight before any compensation, so that groups keep their order on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.algorithms.stats import Stats
from qkit.numerics import QParams, QTensor, cast_codes, choose_qparams, code_dtype
from qkit.numerics.blocks import from_blocks, per_block, to_blocks
from qkit.numerics.values import borders_of, by_code, encode
from qkit.spec import Format, Int, QSpec

# Added to H's diagonal, as a share of its mean: the less data, the less H is to be believed.
DAMP = 0.05
# Columns whose errors are gathered before the rest of the weight is updated (in one product).
BLOCK = 128


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
    scale, zero_point = _per_value(qparams, spec, weight)
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


def _per_value(qparams: QParams, spec: QSpec, weight: Tensor) -> tuple[Tensor, Tensor]:
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
    factor = _inverse_factor(moment[order][:, order])
    weight, scale, zero_point = (t[:, order].contiguous() for t in (weight, scale, zero_point))
    codes = torch.empty_like(weight)
    table: tuple[Tensor, ...] = ()
    if not isinstance(fmt, Int):  # once, not for every column
        table = borders_of(fmt, weight), torch.tensor(by_code(fmt)).to(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:stop]  # a view: the columns change as their neighbours are rounded
        errors = torch.empty_like(block)
        for i in range(stop - start):
            at = start + i
            x = block[:, i] / scale[:, at]
            codes[:, at], value = _nearest(x, zero_point[:, at], fmt, table)
            value = value * scale[:, at]
            errors[:, i] = (block[:, i] - value) / factor[at, at]
            block[:, i + 1 :] -= errors[:, i, None] * factor[at, at + 1 : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
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


def _inverse_factor(moment: Tensor) -> Tensor:
    """``U`` with ``U^T U = (H + damping)^-1``, computed in fp64."""
    h = moment.double()
    damp = DAMP * h.diagonal().mean()
    # Inputs that were always zero say nothing: then the identity, which is rounding to nearest.
    h.diagonal().add_(torch.where(damp > 0, damp, torch.ones_like(damp)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).to(moment.dtype)
