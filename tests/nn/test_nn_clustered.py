"""Clustered weights in training: gradients are summed per cluster, zeros stay, ties stay ties."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qkit.nn import QUANTIZED
from qkit.nn.clustered import cluster_weight, share_clusters, to_codebook
from qkit.nn.computed import settled
from qkit.numerics import dequantize


def pruned_linear() -> nn.Linear:
    layer = nn.Linear(24, 13)
    with torch.no_grad():
        layer.weight[torch.rand(13, 24) < 0.7] = 0
    return layer


def entries_of(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations["weight"].original


@pytest.mark.parametrize("k", [2, 5, 16])
def test_values_are_few_and_zeros_stay(k):
    layer = pruned_linear()
    before = layer.weight.detach().clone()
    cluster_weight(layer, k)
    after = layer.weight.detach()
    assert len(after.unique()) == k
    assert torch.equal(after == 0, before == 0)
    assert len(entries_of(layer)) == k - 1  # zero is no parameter


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights():
    layer = pruned_linear()
    x = torch.randn(6, 24)
    cluster_weight(layer, 6)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    for entry, gradient in zip(entries_of(layer), entries_of(layer).grad, strict=True):
        members = weight.detach() == entry
        assert members.any()
        want = weight.grad[members].double().sum()
        # A sum of fp32 gradients: their own error, and one rounding.
        torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-5)


def test_training_moves_entries_and_nothing_else():
    layer = pruned_linear()
    cluster_weight(layer, 8)
    zero = layer.weight == 0
    same = [layer.weight == entry for entry in entries_of(layer)]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    first = entries_of(layer).detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(32, 24)).square().mean().backward()
        optimizer.step()
    assert (entries_of(layer) != first).all()
    assert torch.equal(layer.weight == 0, zero)
    for members, entry in zip(same, entries_of(layer), strict=True):
        assert (layer.weight[members] == entry).all()


@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.full((4, 5), 0.5), torch.eye(4, 5)])
def test_few_distinct_values(weight):
    layer = nn.Linear(5, 4)
    layer.weight = nn.Parameter(weight)
    cluster_weight(layer, 16)
    assert torch.equal(layer.weight, weight)
    plain = settled(layer)
    q = to_codebook(plain, QUANTIZED[nn.Linear], label="few")
    assert torch.equal(dequantize(q), weight)


def test_importance_moves_the_entries():
    layer = nn.Linear(50, 1)
    weight = layer.weight.detach().clone()
    importance = torch.where(weight > 0, 1000.0, 1.0)
    plain = copy.deepcopy(layer)
    cluster_weight(plain, 4)
    cluster_weight(layer, 4, importance)
    error, error_plain = ((m.weight.detach() - weight)[weight > 0].norm() for m in (layer, plain))
    assert error < error_plain


def test_two_layers_share_their_clusters():
    first, second = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    second.weight = first.weight
    cluster_weight(first, 4)
    share_clusters(second, first)
    assert entries_of(second) is entries_of(first)
    (second(first(torch.arange(9))).sum()).backward()
    with torch.no_grad():
        entries_of(first).add_(1)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_convolutions_become_codebooks_of_exactly_their_weight(layer):
    cluster_weight(layer, 5)
    plain = settled(layer)
    kind = QUANTIZED[type(plain)]
    made = kind.from_float(plain, to_codebook(plain, kind, label="k"))
    assert torch.equal(made.weight, plain.weight)
    x = torch.randn(2, 4 if isinstance(plain, nn.ConvTranspose2d) else 3, 7, 7)
    assert torch.equal(made(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_it_composes_with_compile_and_copies():
    layer = pruned_linear()
    cluster_weight(layer, 8)
    x = torch.randn(4, 24)
    layer(x).square().sum().backward()
    want, entries_of(layer).grad = entries_of(layer).grad, None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    # The same sums in fp64, of gradients of the compiler's own products.
    torch.testing.assert_close(entries_of(layer).grad, want)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
