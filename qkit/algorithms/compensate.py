"""Changing a weight column by column, so that later columns make up for each error.

For the layer ``y = W x`` the error of the outputs is ``tr((W - Q) H (W - Q)^T)`` with
``H = E[x x^T]``. Changing column ``i`` of ``W`` by ``e_i`` is compensated best by adding
``-e_i U[i, j] / U[i, i]`` to each later column ``j``, where ``U`` is the upper Cholesky factor of
``H^-1``: Frantar et al. 2023 (arXiv 2210.17323), steps 1 to 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Added to H's diagonal, as a share of its mean: the less data, the less H is to be believed.
DAMP = 0.05
# Columns whose errors are gathered before the rest of the weight is updated (in one product).
BLOCK = 128


def compensate(weight: Tensor, factor: Tensor, replace: Callable[[int, Tensor], Tensor]) -> None:
    """Give ``replace(i, column)`` each column of ``weight`` for the value that it takes.

    ``weight`` is changed in place: at each call the columns from ``i`` to the end of their block of
    :data:`BLOCK` hold what compensation has made of them.
    """
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:stop]  # a view: the columns change as their neighbours do
        errors = torch.empty_like(block)
        for i in range(stop - start):
            at = start + i
            value = replace(at, block[:, i])
            errors[:, i] = (block[:, i] - value) / factor[at, at]
            block[:, i + 1 :] -= errors[:, i, None] * factor[at, at + 1 : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]


def inverse_factor(moment: Tensor) -> Tensor:
    """``U`` with ``U^T U = (H + damping)^-1``, computed in fp64."""
    h = moment.double()
    damp = DAMP * h.diagonal().mean()
    # Inputs that were always zero say nothing: then the identity, which compensates nothing.
    h.diagonal().add_(torch.where(damp > 0, damp, torch.ones_like(damp)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).to(moment.dtype)
