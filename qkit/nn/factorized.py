"""Layers that are factorized: one linear map as several smaller ones, one after the other.

=============  ====================================================================================
``svd``        Linear ``in -> r``, Linear ``r -> out``: ``W = B A``
``channel``    the kernel ``in -> r``, ``1x1`` ``r -> out``: the same, of the flattened weight
``spatial``    ``kx1`` ``in -> r``, ``1xk`` ``r -> out``
``tucker``     ``1x1`` ``in -> r_in``, the kernel ``r_in -> r_out``, ``1x1`` ``r_out -> out``
``cp``         ``1x1`` ``in -> r``, a depthwise layer for each dimension of it, ``1x1`` to out
``separable``  a depthwise kernel, ``in -> r in``, ``1x1`` ``r in -> out``; ``r`` is the multiplier
=============  ====================================================================================

The bias is the last layer's. Stride, padding and dilation go to the layers with the kernel (in
``spatial`` and ``cp``, those of each dimension with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Layer = Any  # nn.Linear or a convolution
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = {
    "svd": 1,
    "channel": 1,
    "spatial": 1,
    "tucker": 2,
    "cp": 1,
    "separable": 1,
}  # and how many ranks


class Factorized(nn.Sequential):
    """The factors of a layer, of a ``kind`` and ``ranks``; ``weight`` is what they merge to."""

    def __init__(self, kind: str, ranks: Sequence[int], *factors: nn.Module) -> None:
        super().__init__(*factors)
        self.kind, self.ranks = kind, tuple(ranks)
        # What it was when it was made: later pruning may shrink the factors.
        self.sizes = sizes_of(factors[0])[0], sizes_of(factors[-1])[1]

    @property
    def bias(self) -> Tensor | None:
        """That of the last factor."""
        last: Layer = self[-1]
        return last.bias

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same, computed at every access."""
        w: list[Tensor] = [factor.weight for factor in self]  # type: ignore[misc]
        if self.kind == "svd":
            return w[1] @ w[0]
        if self.kind == "channel":
            return torch.einsum("or,ri...->oi...", w[1].flatten(1), w[0])
        if self.kind == "spatial":
            return torch.einsum("orw,rih->oihw", w[1].squeeze(2), w[0].squeeze(3))
        last, first = w[-1].flatten(1), w[0].flatten(1)
        if self.kind == "separable":
            kernels = w[0].squeeze(1).unflatten(0, (-1, self.ranks[0]))
            weights = last.unflatten(1, kernels.shape[:2])
            return torch.einsum("oir,ir...->oi...", weights, kernels)
        if self.kind == "tucker":
            return torch.einsum("op,pq...,qi->oi...", last, w[1], first)
        terms = last[:, None] * first.T[None]  # [out, in, r]
        for factor in w[1:-1]:
            terms = terms[..., None, :] * factor.flatten(1).T
        return terms.sum(-1)

    def extra_repr(self) -> str:
        """The kind and the ranks."""
        return f"{self.kind}, rank {' and '.join(map(str, self.ranks))}"


def sizes_of(layer: Layer) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def obstacle(layer: nn.Module, kind: str) -> str | None:
    """Why ``layer`` has no factors of this kind; None where it has."""
    if kind == "svd":
        return None if type(layer) is nn.Linear else "no linear layer"
    if type(layer) not in CONVOLUTIONS:
        return "no convolution"
    conv: Layer = layer
    if conv.groups != 1:
        return f"has {conv.groups} groups: its channels do not mix"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return "pads in another way than with a number of zeros on both sides"
    if kind == "spatial" and type(conv) is not nn.Conv2d:
        return "its kernel does not have two dimensions"
    if kind in ("spatial", "cp", "tucker", "separable") and max(conv.kernel_size) == 1:
        return "has no kernel to separate"
    return None


def cost(layer: Layer, kind: str, ranks: Sequence[int]) -> int:
    """The parameters of the factors' weights."""
    inputs, outputs = sizes_of(layer)
    r = ranks[0]
    if kind == "svd":
        return r * (inputs + outputs)
    kernel = layer.kernel_size
    area = int(torch.Size(kernel).numel())
    if kind == "channel":
        return r * (inputs * area + outputs)
    if kind == "spatial":
        return r * (inputs * kernel[0] + outputs * kernel[1])
    if kind == "separable":
        return r * inputs * (area + outputs)
    if kind == "tucker":
        out_rank, in_rank = ranks
        return in_rank * inputs + out_rank * in_rank * area + out_rank * outputs
    return r * (inputs + sum(kernel) + outputs)


def empty_factors(
    layer: Layer, kind: str, ranks: Sequence[int], sizes: tuple[int, int]
) -> Factorized:
    """Factors with the geometry, dtype and device of ``layer``, for ``sizes`` in and out.

    The values are not set. The bias, where there is one, is the very Parameter of ``layer`` if it
    has the size.
    """
    inputs, outputs = sizes
    given: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    r = ranks[0]
    factors: list[Layer]
    if kind == "svd":
        factors = [
            nn.Linear(inputs, r, bias=False, **given),
            nn.Linear(r, outputs, bias=bias, **given),
        ]
    else:
        factors = _convolutions(layer, kind, ranks, (inputs, outputs), bias, given)
    made = Factorized(kind, ranks, *factors).train(layer.training)
    if bias and layer.bias.shape == (outputs,):
        factors[-1].bias = layer.bias
    for parameter in made.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return made


def _convolutions(
    layer: Layer,
    kind: str,
    ranks: Sequence[int],
    sizes: tuple[int, int],
    bias: bool,
    given: dict[str, Any],
) -> list[Layer]:
    conv, n = type(layer), len(layer.kernel_size)
    inputs, outputs = sizes
    whole = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
    r = ranks[0]

    def along(axis: int) -> dict[str, Any]:
        """The geometry of one dimension of the kernel."""
        neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
        return {
            key: tuple(getattr(layer, key)[d] if d == axis else value for d in range(n))
            for key, value in neutral.items()
        }

    if kind == "channel":
        return [
            conv(inputs, r, layer.kernel_size, bias=False, **whole, **given),
            conv(r, outputs, 1, bias=bias, **given),
        ]
    if kind == "separable":
        return [
            conv(
                inputs, r * inputs, layer.kernel_size, groups=inputs, bias=False, **whole, **given
            ),
            conv(r * inputs, outputs, 1, bias=bias, **given),
        ]
    if kind == "spatial":
        return [
            conv(inputs, r, bias=False, **along(0), **given),
            conv(r, outputs, bias=bias, **along(1), **given),
        ]
    if kind == "tucker":
        out_rank, in_rank = ranks
        middle = [conv(in_rank, out_rank, layer.kernel_size, bias=False, **whole, **given)]
    else:
        out_rank = in_rank = r
        middle = [conv(r, r, groups=r, bias=False, **along(d), **given) for d in range(n)]
    first = conv(inputs, in_rank, 1, bias=False, **given)
    return [first, *middle, conv(out_rank, outputs, 1, bias=bias, **given)]


def factorize_layer(
    layer: Layer, kind: str, weights: Sequence[Tensor], ranks: Sequence[int]
) -> Factorized:
    """``layer`` with factors for its weight, each reshaped to the layer that holds it."""
    made = empty_factors(layer, kind, ranks, sizes_of(layer))
    with torch.no_grad():
        for factor, weight in zip(made, weights, strict=True):
            own: Layer = factor
            own.weight.copy_(weight.reshape(own.weight.shape))
    return made


def merged(factorized: Factorized) -> nn.Module:
    """The one layer that computes what the factors do, with their bias."""
    factors: list[Layer] = list(factorized)
    inputs, outputs = sizes_of(factors[0])[0], sizes_of(factors[-1])[1]
    given: dict[str, Any] = {"bias": factorized.bias is not None, "device": "meta"}
    layer: Layer
    if factorized.kind == "svd":
        layer = nn.Linear(inputs, outputs, **given)
    else:
        # In each dimension, one factor has what the others have only neutrally: 1, or no padding.
        for key in ("kernel_size", "stride", "padding", "dilation"):
            values = [getattr(factor, key) for factor in factors]
            given[key] = tuple(max(each) for each in zip(*values, strict=True))
        layer = type(factors[0])(inputs, outputs, **given)
    layer.weight = nn.Parameter(factorized.weight.detach())
    layer.bias = factorized.bias
    return layer.train(factorized.training)
