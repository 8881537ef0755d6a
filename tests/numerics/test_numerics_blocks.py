"""The only reshape: blocks of any shape, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import blocks_of

from qkit.numerics.blocks import block_range, from_blocks, per_block, to_blocks

SHAPES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7)), min_size=0, max_size=4)


@given(SHAPES)
def test_from_blocks_inverts_to_blocks(sides):
    shape, block_shape = tuple(n for n, _ in sides), tuple(b for _, b in sides)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    back = from_blocks(to_blocks(x, block_shape), shape)
    assert torch.equal(back, x)
    assert back.is_contiguous()


@given(SHAPES)
def test_block_range_is_the_range_of_each_block_and_zero(sides):
    shape, block_shape = tuple(n for n, _ in sides), tuple(b for _, b in sides)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lo, hi = block_range(x, block_shape)
    for block, inside in blocks_of(shape, block_shape):
        values = [0.0, *(float(x[i]) for i in inside)]
        assert (float(lo[block]), float(hi[block])) == (min(values), max(values))


def test_to_blocks_is_a_view_where_it_can_be():
    x = torch.randn(4, 6)
    assert to_blocks(x, (2, 3)).data_ptr() == x.data_ptr()


def test_per_block_meets_the_blocks():
    blocks, scale = to_blocks(torch.ones(4, 6), (1, 4)), torch.tensor([[2.0, 3.0]] * 4)
    scaled = from_blocks(blocks * per_block(scale), (4, 6))
    assert scaled.tolist() == [[2, 2, 2, 2, 3, 3]] * 4


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="argument 2 is"):
        to_blocks(torch.ones(4, 6), (1,))
