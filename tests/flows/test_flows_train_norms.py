"""Batch normalisation by the statistics of all processes: what it computes, in one of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.errors import InputError
from qkit.flows.train.norms import GlobalBatchNorm


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sum over one process; how large each tensor was of which there was one."""
    asked: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: asked.append(len(tensor)))
    return asked


def passed(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, the gradients and the statistics after two steps."""
    x, found = x.clone().requires_grad_(), []
    for power in (2, 3):
        y = norm(x * power)
        (y**power).sum().backward()
        found.append(y.detach())
    return [*found, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 7), (4, 3, 2, 5), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_it_is_torchs(shape, momentum, alone):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(3, momentum=momentum).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, other = torch.randn(shape, dtype=torch.float64), copy.deepcopy(norm)
    wanted = passed(other, x)
    assert not alone
    with GlobalBatchNorm():
        found = passed(norm, x)
    assert alone == [4, 3, 3, 4] * 2  # there, and back
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("call", [
    lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, training=True),
    lambda x, m, v, w, b: torch.batch_norm(x, w, b, m, v, True, 0.1, 1e-5, True),
    lambda x, m, v, w, b: torch.ops.aten.batch_norm.default(x, w, b, m, v, True, 0.1, 1e-5, True),
])  # fmt: skip
def test_whoever_calls_it(call, alone):
    x = torch.randn(8, 3)
    states = [[torch.zeros(3), torch.ones(3), torch.rand(3), None] for _ in range(2)]
    states[1][2] = states[0][2]
    wanted = call(x, *states[0])
    with GlobalBatchNorm():
        found = call(x, *states[1])
    assert len(alone) == 2
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(states[0], states[1])


def test_it_leaves_alone_what_is_evaluated_and_keeps_types(alone):
    norm = nn.BatchNorm1d(3)
    with GlobalBatchNorm():
        assert norm(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16
        alone.clear()
        norm.eval()(torch.randn(1, 3))
        assert not alone
        with pytest.raises(InputError, match="one value in each channel"):
            norm.train()(torch.randn(1, 3))
