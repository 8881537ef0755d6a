"""Fake quantization: the numbers of the quantized model, with a gradient to train them by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qkit.numerics.blocks import from_blocks, per_block, to_blocks
from qkit.numerics.tensors import QParams
from qkit.spec import Int, QSpec


def fake_quantize(
    x: Tensor, qparams: QParams, spec: QSpec, *, gradient_scale: float | None = None
) -> Tensor:
    """``dequantize(quantize(x, qparams, spec), x.dtype)``, bit for bit, but differentiable.

    With ``v = x / scale``, ``code = round(v) + zero_point`` before it is clamped to ``c``, and
    ``inside`` where ``qmin <= code <= qmax`` (so up to half a step beyond the outermost numbers,
    as in torch), the gradients are those of ``(c - zero_point) * scale`` with ``round`` taken as
    the addition of a constant (the straight-through estimator, Bengio et al. 2013,
    arXiv 1308.3432)::

        d/dx            1 inside                   0 outside
        d/dscale        round(v) - v inside        c - zero_point outside
        d/dzero_point   0 inside                   -scale outside

    The second line is learned step size quantization, LSQ (Esser et al. 2020, arXiv 1902.08153,
    equation 3), the third its LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576). The last two are
    summed over the block and multiplied by ``gradient_scale``: LSQ's ``1 / sqrt(n * qmax)`` unless
    given, with ``n`` the values in a (full) block and ``qmax`` at least 1; give 1 for the plain
    derivatives. They are computed only for a ``scale`` or ``zero_point`` that requires them.

    ``x`` has any shape and float dtype, which is also the result's. A learned zero point is a
    float tensor, and is rounded and clamped to the codes here. A negative scale (the side of the
    extra code of a full symmetric range) needs no special case; one that training moves closer to
    zero than the smallest normal number counts as that number, with its sign. NaN stays NaN, so
    that training that diverges is seen, and infinity is clamped; neither is refused here.
    """
    fmt = spec.format
    if not isinstance(fmt, Int):
        raise TypeError(f"{fmt} has no codes: cast it (qkit.numerics.cast)")
    block_shape = spec.granularity.block_shape(tuple(x.shape))
    if gradient_scale is None:
        gradient_scale = 1 / math.sqrt(math.prod(block_shape) * max(fmt.qmax, 1))
    return _FakeQuantize.apply(
        x, qparams.scale, qparams.zero_point, block_shape, fmt, gradient_scale
    )


def _parts(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block_shape: tuple[int, ...], fmt: Int
) -> tuple[Tensor, Tensor, Tensor]:
    """``x / scale`` in blocks, and scale and zero point that meet them, in one dtype."""
    work = torch.promote_types(x.dtype, torch.float32)
    s = per_block(scale.to(work))
    s = torch.copysign(s.abs().clamp(min=torch.finfo(work).tiny), s)
    z = torch.zeros_like(s)
    if zero_point is not None:
        z = per_block(zero_point.to(work).round().clamp(fmt.qmin, fmt.qmax))
    return to_blocks(x.to(work), block_shape) / s, s, z


class _FakeQuantize(torch.autograd.Function):
    """The formulas of :func:`fake_quantize`."""

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        block_shape: tuple[int, ...],
        fmt: Int,
        gradient_scale: float,
    ) -> Tensor:
        v, s, z = _parts(x, scale, zero_point, block_shape, fmt)
        codes = (v.round() + z).clamp(fmt.qmin, fmt.qmax)
        return from_blocks((codes - z) * s, tuple(x.shape)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, *ctx.how = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        block_shape, fmt, gradient_scale = ctx.how
        v, s, z = _parts(x, scale, zero_point, block_shape, fmt)
        code = v.round() + z
        inside = (code >= fmt.qmin) & (code <= fmt.qmax)
        g = to_blocks(grad.to(v.dtype), block_shape)
        to_x = to_scale = to_zero_point = None
        if ctx.needs_input_grad[0]:
            to_x = from_blocks(torch.where(inside, g, 0), tuple(x.shape)).to(x.dtype)

        def summed(terms: Tensor, like: Tensor) -> Tensor:
            # Axis by axis: torch cuts a sum of everything at once by the number of threads.
            total = terms
            for axis in reversed(range(1, terms.ndim, 2)):
                total = total.sum(axis, keepdim=True, dtype=torch.float64)
            return (total.reshape(like.shape) * gradient_scale).to(like.dtype)

        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, v.round() - v, code.clamp(fmt.qmin, fmt.qmax) - z)
            to_scale = summed(g * slope, scale)
        if zero_point is not None and ctx.needs_input_grad[2]:
            to_zero_point = summed(torch.where(inside, 0, -s) * g, zero_point)
        return to_x, to_scale, to_zero_point, None, None, None
