"""The metrics equal a slow numpy oracle, and say something sensible about everything else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import InputError
from qkit.report import ClassStats, ErrorStats, compare, compare_classes, tensor_sqnr_db
from qkit.report.metrics import sqnr_db

NAN, INF = math.nan, math.inf
NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)


def oracle(reference: list[list[float]], outputs: list[list[float]]) -> tuple[float, float, float]:
    """(sqnr_db, cosine, max_abs), value by value."""
    r = [v for values in reference for v in values]
    x = [v for values in outputs for v in values]
    signal = math.fsum(a * a for a in r)
    noise = math.fsum((a - b) ** 2 for a, b in zip(r, x, strict=True))
    dot = math.fsum(a * b for a, b in zip(r, x, strict=True))
    norm = math.sqrt(signal) * math.sqrt(math.fsum(b * b for b in x))
    worst = max(abs(a - b) for a, b in zip(r, x, strict=True))
    return 10 * float(np.log10(signal / noise)), dot / norm, worst


def stats(reference: list[float], output: list[float]) -> ErrorStats:
    as_tensor = [torch.tensor(v, dtype=torch.float32) for v in (reference, output)]
    return compare(as_tensor[:1], as_tensor[1:])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("shapes", [[(7,)], [(3, 4), (5,)], [(2, 1, 3), (1,), (4, 4)]], ids=str)
def test_equals_the_oracle(shapes, dtype):
    reference = [torch.randn(shape).to(dtype) for shape in shapes]
    outputs = [(r + 0.1 * torch.randn(r.shape)).to(dtype) for r in reference]
    lists = [[t.double().flatten().tolist() for t in side] for side in (reference, outputs)]
    got = compare(reference, outputs)
    assert (got.sqnr_db, got.cosine, got.max_abs) == pytest.approx(oracle(*lists), rel=1e-9)
    assert got.max_ref == max(float(r.double().abs().max()) for r in reference)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_bounds(pairs):
    got = stats([a for a, _ in pairs], [b for _, b in pairs])
    assert -1 - 1e-9 <= got.cosine <= 1 + 1e-9
    assert (got.sqnr_db is None) == (got.max_abs == 0)
    assert not math.isnan(got.max_abs)
    json.dumps(got.to_json(), allow_nan=False)


def test_a_known_case():
    got = stats([3.0, 4.0], [3.0, 4.5])
    assert got.sqnr_db == pytest.approx(20.0)
    assert got.max_abs == 0.5
    assert got.max_ref == 4.0


def test_exact_is_none():
    assert stats([1.0, -2.0], [1.0, -2.0]) == ErrorStats(None, pytest.approx(1.0), 0.0, 2.0)
    assert stats([0.0], [-0.0]).sqnr_db is None


def test_opposite_outputs():
    assert stats([1.0, 2.0], [-1.0, -2.0]).cosine == pytest.approx(-1.0)


def test_a_zero_reference():
    assert stats([0.0, 0.0], [0.0, 0.0]) == ErrorStats(None, 1.0, 0.0, 0.0)
    assert stats([0.0, 0.0], [0.0, 1.0]) == ErrorStats(-INF, 0.0, 1.0, 0.0)


def test_a_zero_output():
    got = stats([3.0, 4.0], [0.0, 0.0])
    assert (got.sqnr_db, got.cosine, got.max_abs) == (pytest.approx(0.0), 0.0, 4.0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_same_non_finite_value_is_no_error(value):
    got = stats([1.0, value], [1.0, value])
    assert (got.sqnr_db, got.max_abs) == (None, 0.0)
    assert got.cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reference", "output"),
    [
        (1.0, NAN),
        (1.0, INF),
        (1.0, -INF),
        (NAN, 1.0),
        (INF, 1.0),
        (INF, -INF),
        (NAN, INF),
        (0.0, NAN),
    ],
)
def test_a_non_finite_value_on_one_side_is_an_infinite_error(reference, output):
    got = stats([1.0, reference], [1.0, output])
    assert got.sqnr_db == -INF
    assert got.max_abs == INF
    assert math.isfinite(got.cosine)


def test_nothing_but_nan_is_not_similar_to_zero():
    assert stats([0.0, 0.0], [NAN, NAN]).cosine != 1.0


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_stats_are_strict_json(value):
    for got in (stats([1.0, 2.0], [1.0, value]), stats([0.0], [1.0]), stats([1.0], [1.0])):
        data = json.loads(json.dumps(got.to_json(), allow_nan=False))
        assert data.keys() == {"sqnr_db", "cosine", "max_abs"}


@pytest.mark.parametrize(("reference", "outputs"), [([], []), ([()], [()])], ids=["none", "empty"])
def test_nothing_to_compare(reference, outputs):
    tensors = [[torch.tensor(v) for v in side] for side in (reference, outputs)]
    assert compare(*tensors) == ErrorStats(None, 1.0, 0.0, 0.0)


def test_empty_tensors_do_not_count():
    some = torch.tensor([3.0, 4.0])
    got = compare([torch.empty(0, 2), some], [torch.empty(0, 2), some])
    assert (got.sqnr_db, got.max_ref) == (None, 4.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
def test_integer_and_bool_outputs(dtype):
    reference, output = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
    assert compare([reference], [reference]).sqnr_db is None
    assert compare([reference], [output]).max_abs == 1.0


@pytest.mark.filterwarnings("error")
def test_complex_outputs_have_two_parts():
    reference = torch.tensor([3 + 4j])
    got = compare([reference], [torch.tensor([3 + 4.5j])])
    assert got.sqnr_db == pytest.approx(20.0)
    assert got.max_abs == pytest.approx(0.5)
    assert compare([reference], [reference]).sqnr_db is None


@pytest.mark.parametrize(
    ("reference", "outputs"),
    [
        ([(2, 3)], [(3, 2)]),
        ([(2, 3)], [(6,)]),
        ([(1,)], [(3,)]),  # not broadcast
        ([(2,)], [()]),
        ([(2,)], []),
        ([(2,)], [(2,), (2,)]),
        ([(0,)], [(0, 1)]),
    ],
    ids=str,
)
def test_other_shapes_are_refused(reference, outputs):
    with pytest.raises(InputError, match="do not correspond"):
        compare([torch.zeros(s) for s in reference], [torch.zeros(s) for s in outputs])


def test_inputs_with_gradients_are_not_changed():
    reference, output = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    compare([reference], [output])
    tensor_sqnr_db(reference.detach(), output.detach())
    assert torch.equal(reference, torch.ones(3))
    assert torch.equal(output, torch.zeros(3))


@pytest.mark.parametrize(
    ("signal", "noise", "want"),
    [(1, 0, None), (0, 0, None), (0, 1, -INF), (1, INF, -INF), (100, 1, 20.0), (1, 100, -20.0)],
)
def test_sqnr_of_powers(signal, noise, want):
    assert sqnr_db(signal, noise) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensor_sqnr(dtype):
    reference = torch.randn(5, 7).to(dtype)
    x = (reference + 0.05 * torch.randn(5, 7)).to(dtype)
    before = reference.clone(), x.clone()
    want = compare([reference], [x]).sqnr_db
    assert tensor_sqnr_db(reference, x) == pytest.approx(want, abs=1e-3)
    assert torch.equal(reference, before[0])
    assert torch.equal(x, before[1])


def test_tensor_sqnr_of_special_tensors():
    ones = torch.ones(3)
    assert tensor_sqnr_db(ones, ones) is None
    assert tensor_sqnr_db(0 * ones, ones) == -INF
    assert tensor_sqnr_db(ones, 0 * ones) == pytest.approx(0.0)
    assert tensor_sqnr_db(torch.empty(0), torch.empty(0)) is None


def test_tensor_sqnr_of_many_large_values():
    big = torch.full((1000,), 1e18)  # their squares overflow a sum in fp32
    assert tensor_sqnr_db(big, big * 1.1) == pytest.approx(20.0, abs=1e-3)


# Classes


def class_oracle(reference: list[list[float]], outputs: list[list[float]]) -> tuple[float, float]:
    """(agreement, divergence) of rows of logits, term by term."""
    hits, total = 0, 0.0
    for r, x in zip(reference, outputs, strict=True):
        p, q = ([math.exp(v - max(row)) for v in row] for row in (r, x))
        p, q = ([v / math.fsum(row) for v in row] for row in (p, q))
        hits += r.index(max(r)) == x.index(max(x))
        total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return hits / len(reference), total / len(reference)


@pytest.mark.parametrize("shape", [(7, 5), (1, 2), (3, 4, 6)], ids=str)
def test_classes_equal_the_oracle(shape):
    reference = [torch.randn(shape), torch.randn(shape)]
    outputs = [r + 0.5 * torch.randn(shape) for r in reference]
    rows = [torch.cat(side).double().flatten(0, -2).tolist() for side in (reference, outputs)]
    got = compare_classes(reference, outputs)
    assert (got.top1_agreement, got.kl_divergence) == pytest.approx(class_oracle(*rows))
    assert compare_classes(reference, reference) == ClassStats(1.0, 0.0)
    # Logits are the same up to a constant; probabilities are taken as they are.
    shifted = compare_classes(reference, [x + 3 for x in outputs])
    assert shifted.kl_divergence == pytest.approx(got.kl_divergence)
    given = compare_classes([r.softmax(-1) for r in reference], [x.softmax(-1) for x in outputs])
    assert given.kl_divergence == pytest.approx(got.kl_divergence, abs=1e-6)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4),
        torch.ones(4, 1),
        torch.ones(2, 3, 4, 5),
        torch.ones(0, 3),
        torch.ones(2, 3).int(),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)}",
)
def test_what_does_not_look_like_classes(tensor):
    assert compare_classes([tensor], [tensor]) is None


def test_other_sizes_are_no_classes_to_compare():
    assert compare_classes([torch.ones(2, 3)], [torch.ones(2, 4)]) is None
    assert compare_classes([], []) is None


def test_a_class_that_cannot_be_has_no_weight():
    reference = torch.tensor([[0.0, 1.0, -INF]])
    assert compare_classes([reference], [reference]) == ClassStats(1.0, 0.0)
    got = compare_classes([torch.zeros(1, 3)], [reference])
    assert got == ClassStats(0.0, None)
