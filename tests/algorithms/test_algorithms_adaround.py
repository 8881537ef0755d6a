"""AdaRound against every way to round a short row, and against rounding to nearest."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from qkit.algorithms import Stats, adaround, rtn
from qkit.errors import UsageError
from qkit.numerics import choose_qparams, dequantize
from qkit.spec import PerChannel, QSpec, parse

WEIGHT = parse("int8-static").weight
COLUMNS = 9


def stats(columns: int, groups: int = 1) -> Stats:
    """Of vectors whose features go together, as activations do."""
    learnt = Stats.empty(groups, columns)
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    learnt.update((torch.randn(groups, 300, columns) @ mixing).relu())
    return learnt


def losses(weight: Tensor, rounded: Tensor, moment: Tensor) -> Tensor:
    d = (weight - rounded).double()
    return ((d @ moment.double()) * d).sum(1)


def best(weight: Tensor, spec: QSpec, moment: Tensor) -> Tensor:
    """The least error of each row, by trying all ways to round up and down."""
    scale = choose_qparams(weight, spec).scale.reshape(-1, 1)
    low = (weight / scale).floor()
    ways = torch.tensor(list(product((0, 1), repeat=weight.shape[1])))
    found = []
    for row in range(len(weight)):
        codes = (low[row] + ways).clamp(-127, 127)
        found.append(losses(weight[row], codes * scale[row], moment).min())
    return torch.stack(found)


def test_it_is_near_the_best_way_to_round() -> None:
    weight, learnt = torch.randn(24, COLUMNS), stats(COLUMNS)
    q = adaround(weight, WEIGHT, learnt)
    nearest = losses(weight, dequantize(rtn(weight, WEIGHT)), learnt.moment[0])
    ours = losses(weight, dequantize(q), learnt.moment[0])
    least = best(weight, WEIGHT, learnt.moment[0])
    fp32 = 1e-5 * nearest
    assert (ours <= nearest + fp32).all()
    assert (ours >= least - fp32).all()
    # Nine tenths of what rounding well can win.
    assert (ours - least).sum() <= 0.1 * (nearest - least).sum()
    # Only the way each weight is rounded is learnt.
    assert torch.equal(q.qparams.scale, choose_qparams(weight, WEIGHT).scale)
    assert ((dequantize(q) - weight).abs() < q.qparams.scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g32-asym", "w3a16", "w8a16-tensor"])
def test_every_granularity_gains(name: str) -> None:
    weight, spec, learnt = torch.randn(11, 40), parse(name).weight, stats(40)
    errors = [
        losses(weight, dequantize(q), learnt.moment[0]).sum()
        for q in (adaround(weight, spec, learnt), rtn(weight, spec))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_groups_see_their_own_inputs() -> None:
    weight, learnt = torch.randn(6, COLUMNS), stats(COLUMNS, groups=2)
    whole = dequantize(adaround(weight, WEIGHT, learnt))
    for index, rows in enumerate(weight.chunk(2)):
        alone = Stats(learnt.moment[index : index + 1], learnt.vectors)
        assert torch.equal(whole.chunk(2)[index], dequantize(adaround(rows, WEIGHT, alone)))


def test_inputs_that_were_always_zero_say_nothing() -> None:
    weight, silent = torch.randn(3, 5), Stats.empty(1, 5)
    silent.update(torch.zeros(1, 7, 5))
    assert torch.equal(adaround(weight, WEIGHT, silent).codes, rtn(weight, WEIGHT).codes)


def test_formats_without_neighbours() -> None:
    with pytest.raises(UsageError, match="integers"):
        adaround(torch.randn(3, 4), parse("nf4").weight, stats(4))
    assert WEIGHT.granularity == PerChannel(0)
