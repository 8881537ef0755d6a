"""AdaRound: learn for each weight whether to round it up or down, for the layer's outputs.

Nagel et al. 2020 (arXiv 2004.10568). With ``d`` the errors of one row of a weight in steps, the
error of the layer's outputs is ``d^T H d`` with ``H = E[x x^T]`` (equation 13). Each weight becomes
``floor(w / scale) + h(v)`` with the rectified sigmoid ``h`` (equation 23), and

    d^T H d + LAMBDA sum(1 - |2 h(v) - 1|^beta)                        (equations 21 and 24)

is minimised over ``v``, with ``H`` scaled to a mean of 1 on its diagonal, while ``beta`` falls, so
that ``h`` ends near 0 or 1. Of each row the better of the result and rounding to nearest is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkit.algorithms.gptq import per_value
from qkit.algorithms.stats import Stats
from qkit.errors import UsageError
from qkit.numerics import QTensor, choose_qparams, code_dtype
from qkit.spec import Int, QSpec

# The stretch of the rectified sigmoid, the weight of the regulariser, its exponent, from and to.
ZETA, GAMMA = 1.1, -0.1
LAMBDA = 1.0
BETA = 20.0, 2.0
# Steps of Adam, and the share of them without the regulariser. The paper takes 10000 on samples;
# here the gradient is exact.
STEPS, WARM = 300, 0.2
RATE = 0.03
# What Adam keeps of its means at each step.
MEAN, SQUARE = 0.9, 0.999


def adaround(weight: Tensor, spec: QSpec, stats: Stats, *, name: str = "weight") -> QTensor:
    """``weight`` ``[out, in]`` quantized by ``spec``, with the inputs' second moments in ``stats``.

    The scales are those of rounding to nearest. Raises what :func:`qkit.algorithms.rtn` raises, and
    :class:`~qkit.errors.UsageError` for a format that is not of integers.
    """
    fmt = spec.format
    if not isinstance(fmt, Int):
        raise UsageError("adaround learns to round to integers", where=name, got=str(fmt))
    qparams = choose_qparams(weight, spec, name=name)
    scale, zero_point = (t.float() for t in per_value(qparams, spec, weight))
    groups = len(stats.moment)
    rows, zeros = (t.unflatten(0, (groups, -1)) for t in (weight.float() / scale, zero_point))
    codes = _learn(rows, zeros, stats.moment, fmt).flatten(0, 1)
    return QTensor(codes.to(code_dtype(fmt)), qparams, spec)


def _learn(w: Tensor, zero_point: Tensor, moment: Tensor, fmt: Int) -> Tensor:
    """The codes of rows ``[groups, rows, in]``, given in steps; those of a group see inputs with
    the same ``moment`` ``[groups, in, in]``."""
    nearest = (w.round() + zero_point).clamp(fmt.qmin, fmt.qmax)
    power = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    known = power > 0  # inputs that were always zero say nothing
    if not known.any():
        return nearest
    h = moment.float() / torch.where(known, power, 1.0)

    def loss(codes: Tensor) -> Tensor:
        """``d^T H d`` of each row."""
        d = w - (codes - zero_point)
        return ((d @ h) * d).sum(2, keepdim=True)

    low = w.floor() + zero_point
    # h(v) starts as what rounding left: the weights are exact then.
    start = ((w - w.floor() - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)
    v = torch.logit(start)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    warm = int(WARM * STEPS)
    for step in range(STEPS):
        soft = v.sigmoid()
        up = (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        codes = low + up
        d = w - (codes.clamp(fmt.qmin, fmt.qmax) - zero_point)
        slope = torch.where(codes <= fmt.qmax, -2 * (d @ h), 0.0)
        if step >= warm:
            left = 1 - (step - warm) / (STEPS - warm)
            beta = BETA[1] + (BETA[0] - BETA[1]) * 0.5 * (1 - math.cos(math.pi * left))
            side = 2 * up - 1
            slope -= LAMBDA * 2 * beta * side.abs().pow(beta - 1) * side.sign()
        slope *= torch.where((up > 0) & (up < 1), soft * (1 - soft) * (ZETA - GAMMA), 0.0)
        # Adam: Kingma and Ba 2015, algorithm 1.
        first.lerp_(slope, 1 - MEAN)
        second.lerp_(slope.square_(), 1 - SQUARE)
        at = step + 1
        size = (second / (1 - SQUARE**at)).sqrt_().add_(1e-8)
        v -= RATE / (1 - MEAN**at) * first / size
    learnt = (low + (v >= 0)).clamp(fmt.qmin, fmt.qmax)
    return torch.where(known & (loss(learnt) < loss(nearest)), learnt, nearest)
