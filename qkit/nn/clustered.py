"""Clustered weights in training: a weight's few shared values are the parameter, not the weight.

``weight[i] = entries[codes[i]]`` with fixed ``codes``: the gradient of an entry is the sum of the
gradients of its weights (Han et al. 2016, Deep Compression, arXiv 1510.00149, section 3.3), and
any optimizer and loop trains it. Weights that are exactly zero (pruned ones) have an entry of
their own that is no parameter, so that they stay zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from qkit.nn.layer import FloatLayer, QLayer
from qkit.numerics import QParams, QTensor
from qkit.numerics.codebook import assign, fit_codebook, lookup
from qkit.spec import Codebook, PerTensor, QSpec


class Clustered(nn.Module):
    """The parametrization of a weight by its entries ``[k]``; a first, fixed one is zero if any
    value of the weight is. It is made with the weight that it clusters to at most ``k`` values."""

    codes: Tensor

    def __init__(self, weight: Tensor, k: int, importance: Tensor | None, name: str) -> None:
        super().__init__()
        flat = weight.detach().flatten()
        kept = flat != 0
        self.has_zero = not bool(kept.all())
        given = None if importance is None else importance.detach().flatten()[kept]
        self.first = _entries(flat[kept], k - int(self.has_zero), given, name)
        codes = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
        if len(self.first):
            found = assign(flat[kept], self.first.reshape(1, -1))
            codes[kept] = found + int(self.has_zero)
        self.register_buffer("codes", codes.reshape(weight.shape), persistent=True)

    def forward(self, entries: Tensor) -> Tensor:
        """The weight."""
        book = F.pad(entries, (1, 0)) if self.has_zero else entries
        return lookup(self.codes, book.reshape(*[1] * self.codes.ndim, -1))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The entries that :func:`torch.nn.utils.parametrize.register_parametrization` keeps."""
        return self.first.to(weight.dtype)


def _entries(values: Tensor, k: int, importance: Tensor | None, name: str) -> Tensor:
    """The distinct entries of the best ``k`` clusters of ``values`` (none for no values)."""
    if not values.numel():
        return values
    if k < 2:  # one cluster: its mean
        weights = torch.ones_like(values) if importance is None else importance
        return (values * weights).sum().div(weights.sum()).reshape(1)
    return fit_codebook(values, k, importance, name=name).flatten().unique().to(values.dtype)


def cluster_weight(
    module: nn.Module, k: int, importance: Tensor | None = None, *, name: str = "weight"
) -> None:
    """Parametrize the weight of ``module`` by at most ``k`` shared values, in place.

    ``importance`` (of the shape of the weight; a diagonal of the Hessian, say) weighs the errors.
    """
    weight: Any = module.weight
    clustered = Clustered(weight, k, importance, name)
    parametrize.register_parametrization(module, "weight", clustered, unsafe=True)


def share_clusters(module: nn.Module, first: nn.Module) -> None:
    """Let ``module``, whose weight is that of ``first``, use the clusters of ``first`` too."""
    lists: Any = first.parametrizations
    parametrize.register_parametrization(module, "weight", lists["weight"][0], unsafe=True)
    own: Any = module.parametrizations
    own["weight"].original = lists["weight"].original


def to_codebook(layer: FloatLayer, kind: type[QLayer], *, label: str) -> QTensor:
    """The weight of ``layer`` as places in the codebook of its distinct values.

    ``kind`` is the class that the layer becomes, ``label`` names the codebook. The weight is fp32
    (or narrower) and has 256 distinct values at most; a codebook has two at least.
    """
    rows = kind.rows(layer).detach().flatten(1).float()
    entries = rows.unique()
    if len(entries) < 2:
        entries = torch.cat([entries, entries + 1])
    # The shortest decimals that round to these numbers of fp32, for they are kept as text.
    numbers = tuple(float(str(value)) for value in entries.numpy())
    spec = QSpec(Codebook(label, numbers), PerTensor())
    codes = assign(rows, entries.reshape(1, 1, -1))
    return QTensor(codes, QParams(torch.ones(1, 1), None), spec)
