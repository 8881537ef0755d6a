"""Least squares: weights that make of rounded inputs what the float ones make of exact inputs.

A layer of a quantized model sees inputs ``x`` with the errors of all layers before it; its outputs
``y`` should be those of the float model. Weight and bias are

    argmin  E |y - W x - b|^2 + k |(W - W0) D^(1/2)|^2

the ridge regression around the float weight ``W0``: ``W = (C_yx + k W0 D) (C_xx + k D)^-1`` of the
centred second moments, with ``D`` the mean of the diagonal of ``C_xx``; ``b = E[y] - W E[x]``.
What the errors before correlate with is taken back, and directions of the inputs that hold little
but error are damped (a Wiener filter). As channel pruning fits what is left to what was there (He
et al. 2017, arXiv 1707.06168), and GPTAQ asks of its rounding (Li et al. 2025, arXiv
2504.02692), here before any rounding of the weight.

How far to believe the data is decided by them: the layer has the ``k`` that predicts one half of
the samples best from the other, and vice versa, each row in units of its variance. ``W0`` itself
(``k`` infinite) is among them, and stays where there are too few vectors to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The ``k`` that are tried, beside an infinite one.
RIDGES = tuple(10.0**-power for power in range(7))
# The vectors that there must be for each column: the layers before are fitted to the same samples,
# so that halves agree on more than they should.
ENOUGH = 10


@dataclass(frozen=True)
class Joint:
    """Sums over ``count`` vectors of a layer's rounded inputs ``x`` ``[groups, count, in]`` and
    exact outputs ``y`` ``[groups, count, out]``, in fp64; both around the first ones seen, ``at``,
    so that a mean far from zero costs no digits."""

    at: tuple[Tensor, Tensor]
    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Joint:
        """The sums of these vectors, around ``at`` or their own mean."""
        x, y = x.double(), y.double()
        at = at or (x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        x, y = x - at[0], y - at[1]
        turned = y.transpose(1, 2)
        return Joint(
            at,
            x.shape[1],
            x.sum(1),
            y.sum(1),
            x.transpose(1, 2) @ x,
            turned @ x,
            y.square().sum(1),
        )

    def __add__(self, other: Joint) -> Joint:
        assert self.at is other.at
        names = ("x", "y", "xx", "yx", "yy")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Joint(self.at, self.count + other.count, **sums)

    @property
    def covariance(self) -> tuple[Tensor, Tensor, Tensor]:
        """``C_xx`` ``[groups, in, in]``, ``C_yx`` ``[groups, out, in]`` and the variances of ``y``
        ``[groups, out]``."""
        x, y = self.x / self.count, self.y / self.count
        return (
            self.xx / self.count - x[:, :, None] * x[:, None],
            self.yx / self.count - y[:, :, None] * x[:, None],
            self.yy / self.count - y.square(),
        )

    def error(self, weight: Tensor) -> Tensor:
        """``E |y - W x - b|^2`` of each row ``[groups, out]``, for the best ``b``."""
        xx, yx, yy = self.covariance
        return ((weight @ xx - 2 * yx) * weight).sum(2) + yy


def least_squares(weight: Tensor, halves: tuple[Joint, Joint]) -> Tensor:
    """The weight ``[out, in]`` that fits ``halves`` of the samples best, near the float one."""
    first, second = halves
    both = first + second
    if both.count < ENOUGH * weight.shape[1]:
        return weight
    rows = weight.double().reshape(len(both.x), -1, weight.shape[1])
    variance = both.covariance[2]
    known = variance > 1e-9 * variance.mean()  # else an output that never changes

    def error(a: Tensor, b: Tensor) -> float:
        """That of what was learnt from each half on the other one."""
        found = (second.error(a) + first.error(b)) / variance
        return float(found[known].sum())

    tried = {k: error(*(_fit(half, rows, k) for half in halves)) for k in RIDGES}
    ridge = min(RIDGES, key=lambda k: tried[k])
    if tried[ridge] >= error(rows, rows):
        return weight
    return _fit(both, rows, ridge).reshape(weight.shape).to(weight.dtype)


def _fit(joint: Joint, weight: Tensor, ridge: float) -> Tensor:
    xx, yx, _ = joint.covariance
    # Where an input is always the same, the float weight is as good as any.
    size = xx.diagonal(dim1=1, dim2=2).mean(1)
    pull = ridge * torch.where(size > 0, size, 1.0)[:, None, None]
    eye = torch.eye(xx.shape[1], dtype=xx.dtype)
    factor = torch.linalg.cholesky(xx + pull * eye)
    return torch.cholesky_solve((yx + pull * weight).transpose(1, 2), factor).transpose(1, 2)
