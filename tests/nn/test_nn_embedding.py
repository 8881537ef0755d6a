"""Quantized tables: the float lookup of the dequantized weight, bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from qkit import native, ops
from qkit.algorithms import rtn
from qkit.nn import QUANTIZED, QEmbedding, QEmbeddingBag, QLayer, QLinear
from qkit.spec import parse

SCHEMES = ["w8a16", "w8a16-tensor-asym", "w4a16-g16-asym", "w3a16-channel", "nf4-g16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def quantize(layer: nn.Module, scheme: str) -> QLayer:
    return QUANTIZED[type(layer)].from_float(
        layer, rtn(layer.weight.detach(), parse(scheme).weight)
    )


def as_float(layer: nn.Module, new: QLayer) -> nn.Module:
    """The float layer with the dequantized weight."""
    exact = copy.deepcopy(layer)
    exact.weight = nn.Parameter(new.values(layer.weight.dtype), requires_grad=False)
    return exact


# Embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_scheme
def test_lookups_are_those_of_the_float_table(scheme, dtype):
    layer = nn.Embedding(31, 33, padding_idx=3).to(dtype)
    new = quantize(layer, scheme)
    exact = as_float(layer, new)
    for indices in (
        torch.tensor(30),
        torch.tensor([3, 0, 30, 3]),
        torch.randint(0, 31, (2, 1, 7)),
        torch.randint(0, 31, (7, 2), dtype=torch.int32).t(),
        torch.empty(2, 0, dtype=torch.int64),
    ):
        got = new(indices)
        assert (got.dtype, got.shape) == (dtype, (*indices.shape, 33))
        assert torch.equal(got, exact(indices))
        assert torch.equal(new(input=indices), got)


@every_scheme
def test_only_the_rows_that_are_looked_up_are_dequantized(scheme, monkeypatch):
    new = quantize(nn.Embedding(1000, 8), scheme)
    monkeypatch.setattr(native, "library", lambda: None)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                self.values = max(self.values, out.numel())
            return out

    with Largest() as largest:
        new(torch.tensor([7, 7, 999]))
    assert largest.values == 3 * 8


@every_scheme
@pytest.mark.parametrize("index", [-1, 31, 1 << 40])
def test_an_index_that_is_no_row_is_refused(scheme, index):
    new = quantize(nn.Embedding(31, 8), scheme)
    with pytest.raises(IndexError):
        new(torch.tensor([0, index]))


def test_indices_must_be_integers():
    with pytest.raises(RuntimeError, match="indices must be int32 or int64"):
        quantize(nn.Embedding(5, 8), "w8a16")(torch.ones(2))


def test_a_zero_padding_row_stays_zero():
    for scheme in ("w8a16", "w8a16-asym", "w4a16-g4-asym", "nf4"):
        new = quantize(nn.Embedding(5, 8, padding_idx=2), scheme)
        assert torch.equal(new(torch.tensor([2])), torch.zeros(1, 8)), scheme


def test_the_kernel_is_called_without_the_dispatcher():
    new, indices = quantize(nn.Embedding(5, 8), "w8a16"), torch.tensor([1, 4])
    with ops.count_calls() as calls:
        first = new(indices)
    assert calls == {f"qkit::embedding[{native.isa() or 'reference'}]": 1}
    new.weight_scale.mul_(2)
    assert torch.equal(new(indices), 2 * first)


# EmbeddingBag


def bags(draw) -> dict[str, Tensor]:
    """What a bag of 11 rows is called with."""
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    count = draw(st.integers(0, 9))
    given = torch.tensor(draw(st.lists(st.integers(0, 10), min_size=count, max_size=count)))
    given = given.to(dtype)
    if draw(st.booleans()):
        length = draw(st.integers(1, 3))
        return {"input": given[: count // length * length].reshape(-1, length)}
    cuts = draw(st.lists(st.integers(0, count), max_size=4))
    return {"input": given, "offsets": torch.tensor([0, *sorted(cuts)], dtype=dtype)}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_bags_are_those_of_the_float_table(data):
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    dtype = data.draw(st.sampled_from(DTYPES))
    layer = nn.EmbeddingBag(
        11, 7, mode=mode, padding_idx=data.draw(st.sampled_from([None, 0, 10, 4]))
    ).to(dtype)
    new = quantize(layer, data.draw(st.sampled_from(SCHEMES)))
    given = bags(data.draw)
    if "offsets" in given and data.draw(st.booleans()):
        layer.include_last_offset = new.include_last_offset = True
        end = torch.tensor([given["input"].numel()], dtype=given["offsets"].dtype)
        given["offsets"] = torch.cat([given["offsets"], end])
    if mode == "sum" and data.draw(st.booleans()):
        given["per_sample_weights"] = torch.randn(given["input"].shape).to(dtype)
    assert torch.equal(new(**given), as_float(layer, new)(**given))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"input": torch.tensor([1, 11]), "offsets": torch.tensor([0])}, IndexError),
        ({"input": torch.tensor([1, 2])}, ValueError),
        ({"input": torch.tensor([[1, 2]]), "offsets": torch.tensor([0])}, ValueError),
    ],
    ids=["index", "no offsets", "offsets of a matrix"],
)
def test_a_bag_refuses_what_torch_refuses(given, error):
    with pytest.raises(error):
        quantize(nn.EmbeddingBag(11, 7), "w8a16")(**given)


def test_weights_of_a_bag_learn():
    layer = nn.EmbeddingBag(11, 7, mode="sum")
    new = quantize(layer, "w4a16-g16")
    indices, offsets = torch.tensor([1, 5, 5]), torch.tensor([0, 2])
    for each in (new, as_float(layer, new)):
        weights = torch.ones(3, requires_grad=True)
        each(indices, offsets, weights).square().sum().backward()
        if each is new:
            got = weights.grad
    torch.testing.assert_close(got, weights.grad)


# As layers


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@every_scheme
def test_state_dicts_and_casts(kind, scheme):
    new, indices = quantize(kind(31, 9), scheme), torch.randint(0, 31, (3, 2))
    want = new(indices)
    with torch.device("meta"):
        empty = QUANTIZED[kind](kind(31, 9), new.spec)
    empty.load_state_dict(new.state_dict(), assign=True)
    assert torch.equal(empty(indices), want)
    assert not list(new.parameters())
    before = new.state_dict()
    half = copy.deepcopy(new).half()
    assert half(indices).dtype == torch.float16
    assert all(torch.equal(t, before[name]) for name, t in half.state_dict().items())


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g16-asym", "nf4-g16"])
def test_export_and_compile(kind, scheme, padding):
    model = quantize(kind(31, 10, padding_idx=padding), scheme).eval()
    # torch's own bag with padding takes the number of rows, here that of the lookups, as fixed.
    dynamic = kind is nn.Embedding or padding is None
    program = torch.export.export(
        model,
        (torch.randint(0, 31, (4, 2)),),
        dynamic_shapes=({0: Dim("batch")},) if dynamic else None,
    )
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (1, 2, 5) if dynamic else (4,):
        given = torch.randint(0, 31, (batch, 2))
        assert torch.equal(program.module()(given), model(given))
        assert torch.equal(compiled(given), model(given))


@every_scheme
def test_a_head_on_the_codes_of_a_table(scheme):
    table, head = nn.Embedding(31, 33), nn.Linear(33, 31, bias=False)
    head.weight = table.weight
    first = quantize(table, scheme)
    second = QLinear(head, first.spec)
    second.share_weight(first)
    assert all(t is first._buffers[name] for name, t in second._buffers.items())
    assert torch.equal(first.weight, second.weight)
    x = torch.randn(2, 33)
    torch.testing.assert_close(second(x), x @ first.weight.t(), rtol=1e-5, atol=1e-5)


def test_geometry_and_repr():
    new = quantize(nn.Embedding(31, 9, padding_idx=5), "w4a16-g16")
    assert isinstance(new, QEmbedding)
    assert (new.num_embeddings, new.embedding_dim, new.padding_idx) == (31, 9, 5)
    assert "QEmbedding(31x9" in repr(new)
    bag = quantize(nn.EmbeddingBag(31, 9, mode="max", padding_idx=5), "w8a16")
    assert isinstance(bag, QEmbeddingBag)
    assert (bag.mode, bag.padding_idx, bag.include_last_offset) == ("max", 5, False)


def test_activations_are_none_of_a_table():
    scheme = parse("w8a8")
    assert QEmbedding.part_of(scheme) == parse("w8a16")
    assert QEmbedding.lacks(parse("w8a16")) is None
    with pytest.raises(TypeError, match="indices"):
        QEmbedding(nn.Embedding(3, 2), scheme.weight, scheme.input)
