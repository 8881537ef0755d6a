"""Statistics do not depend on how the data was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit.algorithms import Stats


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([1, 3]))
def test_the_moment_is_the_mean_outer_product(sizes, groups):
    batches = [torch.randn(groups, n, 5) for n in sizes]
    learnt = Stats.empty(groups, 5)
    for batch in batches:
        learnt.update(batch)
    x = torch.cat(batches, dim=1).double()
    want = x.transpose(1, 2) @ x / max(x.shape[1], 1)
    assert learnt.vectors == sum(sizes)
    torch.testing.assert_close(learnt.moment.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_low_precision_inputs_are_summed_in_fp32(dtype):
    x = torch.full((1, 4096, 2), 0.1).to(dtype)
    learnt = Stats.empty(1, 2)
    learnt.update(x)
    torch.testing.assert_close(learnt.moment[0, 0, 0], x[0, 0, 0].float() ** 2, rtol=1e-5, atol=0)
