"""Statistics do not depend on how the data was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit.algorithms import Stats

# Unit roundoff of fp32. A sum of n products in fp32, in whatever order torch takes them, is off by
# at most n * U of the sum of their magnitudes, to first order (Higham 2002, section 3.1).
U = 2.0**-24


def running_error(sizes: list[int]) -> float:
    """How far the running mean of batches of ``sizes`` may be off, of the greatest |x_i x_j|.

    An update with n vectors: the sum of n products (n U), n times the mean (U), their difference
    and its division by the number of vectors so far (2 U each: the difference of two terms up to
    n, over at least n), the new mean (U). What was off before only shrinks.
    """
    return sum((n + 6) * U for n in sizes if n)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([1, 3]))
def test_the_moment_is_the_mean_outer_product(sizes, groups):
    batches = [torch.randn(groups, n, 5) for n in sizes]
    learnt = Stats.empty(groups, 5)
    for batch in batches:
        learnt.update(batch)
    x = torch.cat(batches, dim=1).double()
    want = x.transpose(1, 2) @ x / max(x.shape[1], 1)
    assert learnt.vectors == sum(sizes)
    largest = float(x.square().max()) if x.numel() else 0.0
    bound = running_error(sizes) * largest
    torch.testing.assert_close(learnt.moment.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_low_precision_inputs_are_summed_in_fp32(dtype):
    """In fp16 or bf16 the sum would stop growing long before its end."""
    n = 4096
    x = torch.full((1, n, 2), 0.1).to(dtype)
    learnt = Stats.empty(1, 2)
    learnt.update(x)
    assert learnt.moment.dtype == torch.float32
    want = x[0, 0, 0].float().double() ** 2
    got = learnt.moment[0, 0, 0].double()
    torch.testing.assert_close(got, want, rtol=running_error([n]), atol=0)
