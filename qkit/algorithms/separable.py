"""A convolution as a depthwise and a pointwise one: the best in the least-squares sense.

The kernels of an input channel ``i`` are a matrix ``W_i [out, k]``; depthwise kernels
``D_i [m, k]`` and weights ``P_i [out, m]`` behind them make ``P_i D_i`` of it, of rank ``m`` (the
depth multiplier; 1 is the depthwise-separable convolution of MobileNets, Howard et al. 2017).
Without data the sum of ``|W_i - P_i D_i|^2`` is least where each is a truncated SVD (Eckart & Young
1936). With the second moment ``M = E[x x^T]`` of the patches ``x [in * k]`` that the kernels meet,
what counts is ``E|W x - P D x|^2 = tr((W - P D) M (W - P D)^T)``, ``D`` block-diagonal: quadratic
in ``P`` for a given ``D`` and the other way round, and lowered by solving for each in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.algorithms.low_rank import DAMP, Spectrum

# Rounds of alternating least squares, each of which lowers the error or leaves it.
ROUNDS = 8
# The largest system of equations for D that is solved (its side); above, P alone fits the data.
MOST_UNKNOWNS = 2400


def separable_spectrum(weight: Tensor) -> Spectrum:
    """What each further depthwise kernel keeps, summed over the input channels."""
    _, values, _ = _svd(weight)
    energy = values.square().sum(0)
    return Spectrum(torch.eye(len(energy), dtype=energy.dtype), energy)


def separable(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(depthwise [in * rank, 1, *kernel], pointwise [out, in * rank])`` for the ``weight``
    ``[out, in, *kernel]``: kernel ``j`` of input ``i`` is row ``i * rank + j``."""
    u, values, v = _svd(weight)
    root = values[:, :rank].sqrt()
    p, d = u[:, :, :rank] * root[:, None], v[:, :rank] * root[..., None]
    pointwise = p.transpose(0, 1).flatten(1)
    if moment is not None:
        pointwise, d = _fitted(weight.detach().double().flatten(1), pointwise, d, moment)
    dtype, kernel = weight.dtype, weight.shape[2:]
    return d.reshape(-1, 1, *kernel).to(dtype), pointwise.to(dtype)


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernels of each input channel, as ``[in, out, k]``."""
    return torch.linalg.svd(
        weight.detach().double().flatten(2).transpose(0, 1), full_matrices=False
    )


def _fitted(w: Tensor, p: Tensor, d: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """``p [out, in * r]`` and ``d [in, r, k]``, improved on inputs of this moment."""
    inputs, r, k = d.shape
    m = moment.double()
    m = m + DAMP * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype, device=m.device)
    target = w @ m  # [out, in * k]
    for _ in range(ROUNDS):
        rows = torch.block_diag(*d)  # [in * r, in * k]
        p = _solve(rows @ m @ rows.T, rows @ target.T).T
        if d.numel() > MOST_UNKNOWNS:
            break
        # Of the unknown d[i, j, a]: sum over d[i', j', b] of (P^T P)[ij, i'j'] M[ia, i'b].
        gram = (p.T @ p).view(inputs, r, 1, inputs, r, 1)
        system = gram * m.view(inputs, 1, k, inputs, 1, k)
        right = torch.einsum("oij,oia->ija", p.unflatten(1, (inputs, r)),
                             target.unflatten(1, (inputs, k)))  # fmt: skip
        side = d.numel()
        d = _solve(system.reshape(side, side), right.reshape(side, 1)).view(inputs, r, k)
    return p, d


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """``a^-1 b`` of a symmetric ``a``, which channels that are never on make singular."""
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.linalg.solve(a + 1e-10 * a.diagonal().mean().clamp(min=1e-30) * eye, b)
