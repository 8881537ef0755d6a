"""GPTQ against a slow oracle, and against rounding to nearest on what it is meant to minimise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkit.algorithms import Stats, gptq, rtn
from qkit.algorithms.compensate import BLOCK, DAMP
from qkit.errors import InputError
from qkit.numerics import choose_qparams, dequantize
from qkit.spec import PRESETS, QSpec, parse

WEIGHT_ONLY = [n for n in PRESETS if n.startswith("w") and parse(n).weight_only]


def inputs(columns: int, vectors: int = 200) -> Tensor:
    """Vectors whose features go together, as activations do."""
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    return torch.randn(vectors, columns) @ mixing + 0.5


def stats(*x: Tensor) -> Stats:
    learnt = Stats.empty(len(x), x[0].shape[1])
    learnt.update(torch.stack(x))
    return learnt


def output_error(weight: Tensor, q: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight - q).double().T).square().sum())


# Unit roundoff of fp32.
U = 2.0**-24


def oracle(weight: np.ndarray, spec: QSpec, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes, one weight after the other: the inverse is computed anew for what is left.

    Also of each row, whether fp32 must find the same codes: whether no value came so near to
    half-way between two codes that the roundings of fp32 may decide.
    """
    rows, columns = weight.shape
    qparams = choose_qparams(torch.tensor(weight, dtype=torch.float32), spec)
    block = spec.granularity.block_shape((rows, columns))
    h = moment + DAMP * np.diag(moment).mean() * np.eye(columns)
    order = np.argsort(-np.diag(moment), kind="stable")
    left, codes = weight.copy(), np.zeros((rows, columns), int)
    off, certain = np.zeros((rows, columns)), np.ones(rows, bool)  # the error of fp32, at most
    for step, column in enumerate(order):
        rest = order[step:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        for row in range(rows):
            place = row // block[0], column // block[1]
            scale = float(qparams.scale[place])
            zero = 0 if qparams.zero_point is None else int(qparams.zero_point[place])
            exact = left[row, column] / scale
            half_way = abs(exact - np.floor(exact) - 0.5)
            certain[row] &= half_way > off[row, column] / abs(scale) + U * abs(exact)
            code = round(exact) + zero
            codes[row, column] = min(max(code, spec.format.qmin), spec.format.qmax)
            error = left[row, column] - (codes[row, column] - zero) * scale
            passed_on = inverse[0] / inverse[0, 0]
            left[row, rest] -= error * passed_on
            off[row, rest] += off[row, column] * abs(passed_on)
            # The error and its division, the factor, their product; and the difference.
            off[row, rest] += 4 * U * abs(error * passed_on) + U * abs(left[row, rest])
    return codes, certain


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w3a16-g7-asym", "w8a16", "w2a16-channel"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 31), (7, 33)], ids=str)
def test_equals_the_oracle(shape, scheme):
    spec, weight = parse(scheme).weight, torch.randn(shape)
    learnt = stats(inputs(shape[1]))
    want, certain = oracle(weight.double().numpy(), spec, learnt.moment[0].double().numpy())
    got = gptq(weight, spec, learnt).codes.numpy()
    assert certain.mean() > 0.5  # else little would be tested
    np.testing.assert_array_equal(got[certain], want[certain])


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_the_outputs_are_closer_than_by_rounding(scheme):
    spec, weight, x = parse(scheme).weight, torch.randn(24, BLOCK + 37), inputs(BLOCK + 37, 2000)
    by_gptq, by_rounding = (
        dequantize(q) for q in (gptq(weight, spec, stats(x)), rtn(weight, spec))
    )
    assert output_error(weight, by_gptq, x) < 0.8 * output_error(weight, by_rounding, x)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a16-tensor"])
def test_inputs_that_do_not_go_together_give_rounding_to_nearest(scheme):
    spec, weight = parse(scheme).weight, torch.randn(5, 33)
    for moment in (torch.eye(33), 3.0 * torch.eye(33), torch.zeros(33, 33)):
        q = gptq(weight, spec, Stats(moment.unsqueeze(0), 1))
        assert torch.equal(q.codes, rtn(weight, spec).codes)
        assert torch.equal(q.qparams.scale, rtn(weight, spec).qparams.scale)


def test_a_feature_that_is_always_zero_disturbs_nobody():
    spec, weight, x = parse("w4a16-channel").weight, torch.randn(5, 9), inputs(9)
    x[:, 4] = 0
    q = gptq(weight, spec, stats(x))
    assert torch.equal(q.codes[:, 4], rtn(weight, spec).codes[:, 4])
    assert output_error(weight, dequantize(q), x) <= output_error(
        weight, dequantize(rtn(weight, spec)), x
    )


def test_each_group_of_a_convolution_sees_its_own_inputs():
    spec, weight = parse("w4a16-channel").weight, torch.randn(6, 9)
    parts = [inputs(9), inputs(9), inputs(9)]
    learnt = stats(*parts)
    whole = gptq(weight, spec, learnt).codes
    for i, moment in enumerate(learnt.moment):
        rows, own = slice(2 * i, 2 * i + 2), Stats(moment.unsqueeze(0), learnt.vectors)
        assert torch.equal(whole[rows], gptq(weight[rows], spec, own).codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_weight_types(dtype):
    spec, weight, x = parse("w4a16-g8").weight, torch.randn(5, 33).to(dtype), inputs(33)
    before = weight.clone()
    q = gptq(weight, spec, stats(x))
    assert torch.equal(weight, before)
    assert output_error(weight.float(), dequantize(q), x) < output_error(
        weight.float(), dequantize(rtn(weight, spec)), x
    )


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(InputError, match=r"fc\.weight"):
        gptq(weight, parse("w4a16").weight, stats(inputs(2)), name="fc.weight")
