"""Low-rank factors of a weight: truncated SVD (of the weight, or of what it does to data), Tucker
and CP. Tensors in, tensors out; computed in fp64.

For a layer ``y = W x`` with inputs of second moment ``M = E[x x^T]``, the matrix of rank ``k`` that
is nearest in ``E |W x - W' x|^2`` is ``W' = U U^T W``, where ``U`` has the ``k`` leading
eigenvectors of ``W M W^T`` as columns; what is lost is the sum of the other eigenvalues. (It is the
truncated SVD of ``W M^1/2``, whitened and back, without an inverse: Eckart & Young 1936; SVD-LLM,
Wang et al. 2024, arXiv 2403.07378, section 3.1.) Without data, ``M`` is the identity, and this is
the truncated SVD of ``W``. At full rank ``U U^T W = W``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to M's diagonal, as a share of its mean: directions that the data never took keep a meaning.
DAMP = 1e-4
# Sweeps of alternating least squares, each of which lowers the error of CP or leaves it.
SWEEPS = 60
RIDGE = 1e-10


@dataclass(frozen=True)
class Spectrum:
    """The directions of a matrix ``[out, in]`` by what they contribute to its outputs.

    ``basis`` ``[out, n]`` has them as columns, ``energy`` ``[n]`` descends; ``n = min(out, in)``.
    """

    basis: Tensor
    energy: Tensor

    def kept(self, rank: int) -> float:
        """The share of the energy that the first ``rank`` directions have."""
        total = float(self.energy.sum())
        return float(self.energy[:rank].sum()) / total if total else 1.0

    def rank_of(self, share: float) -> int:
        """The least rank that keeps this share of the energy; at least 1."""
        kept = self.energy.cumsum(0) / self.energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
        # What rounding left of the last directions is nobody's wish.
        return min(int((kept < share - 1e-12).sum()) + 1, len(self.energy))


def spectrum(matrix: Tensor, moment: Tensor | None = None) -> Spectrum:
    """The spectrum of ``matrix`` ``[out, in]`` on inputs with the second moment ``[in, in]``."""
    w = matrix.detach().double()
    n = min(w.shape)
    if moment is None:
        basis, values, _ = torch.linalg.svd(w, full_matrices=False)
        return Spectrum(basis, values.square())
    m = moment.double()
    m = m + DAMP * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype, device=m.device)
    # Of a tall matrix W = Q R, the eigenvectors are Q times those of the smaller R M R^T.
    q, w = torch.linalg.qr(w) if len(w) > n else (None, w)
    values, basis = torch.linalg.eigh(w @ m @ w.T)
    basis, values = basis.flip(1), values.flip(0).clamp(min=0)
    return Spectrum(basis if q is None else q @ basis, values)


def pair(matrix: Tensor, found: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """``(A [rank, in], B [out, rank])`` with ``B A`` the best approximation of rank ``rank``.

    A row of A and its column of B have one norm, which quantization and training like.
    """
    w = matrix.detach().double()
    b = found.basis[:, :rank]
    a = b.T @ w
    size = a.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return (a / size[:, None]).to(matrix.dtype), (b * size).to(matrix.dtype)


def tucker(weight: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """``(first [r_in, in], core [r_out, r_in, *kernel], last [out, r_out])`` of a convolution.

    Tucker-2 (Kim et al. 2016, arXiv 1511.06530): the kernel's dimensions stay whole. The bases are
    those of the unfolded weight, then improved in turn (HOOI: De Lathauwer et al. 2000).
    """
    w = weight.detach().double()
    out_rank, in_rank = ranks
    v = _basis(w.transpose(0, 1), in_rank)
    for _ in range(3):
        u = _basis(torch.einsum("oi...,ir->or...", w, v), out_rank)
        v = _basis(torch.einsum("oi...,or->ir...", w, u), in_rank)
    core = torch.einsum("oi...,op,iq->pq...", w, u, v)
    dtype = weight.dtype
    return v.T.to(dtype), core.to(dtype), u.to(dtype)


def _basis(w: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of ``w`` with all but its first dimension flattened."""
    return torch.linalg.svd(w.flatten(1), full_matrices=False)[0][:, :rank]


def unfolding_spectra(weight: Tensor) -> tuple[Spectrum, Spectrum]:
    """The spectra of a convolution's weight along its outputs and along its inputs."""
    return spectrum(weight.flatten(1)), spectrum(weight.transpose(0, 1).flatten(1))


def cp(weight: Tensor, rank: int) -> list[Tensor]:
    """Factors ``[n_d, rank]`` for each dimension of ``weight``, whose outer products sum to it.

    CP decomposition (Lebedev et al. 2015, arXiv 1412.6553) by alternating least squares from the
    leading singular vectors; deterministic.
    """
    w = weight.detach().double()
    generator = torch.Generator().manual_seed(rank)
    factors = []
    for axis, size in enumerate(w.shape):
        start = _basis(w.movedim(axis, 0), min(rank, size))
        more = torch.randn(size, rank - start.shape[1], generator=generator, dtype=w.dtype)
        factors.append(torch.cat([start, more.to(w.device)], dim=1))
    for _ in range(SWEEPS):
        for axis in range(w.ndim):
            others = [f for i, f in enumerate(factors) if i != axis]
            gram = torch.ones(rank, rank, dtype=w.dtype, device=w.device)
            for f in others:
                gram = gram * (f.T @ f)
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            target = w.movedim(axis, 0).flatten(1) @ _khatri_rao(others)
            factors[axis] = torch.linalg.solve(gram, target.T).T
    norms = [f.norm(dim=0).clamp(min=torch.finfo(w.dtype).tiny) for f in factors]
    even = torch.stack(norms).log().mean(0).exp()  # all factors of a term get one norm
    return [(f / n * even).to(weight.dtype) for f, n in zip(factors, norms, strict=True)]


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columnwise outer products: ``[n_1 n_2 ..., rank]``, the last factor's index the fastest."""
    out = factors[0]
    for f in factors[1:]:
        out = (out[:, None] * f[None]).flatten(0, 1)
    return out
