"""Every granularity is a block shape; scale shapes follow."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import UsageError
from qkit.spec import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qkit.spec.granularity import granularity_from_json, granularity_to_json

# granularity, shape of the tensor, shape of a block, shape of the scale
SHAPES = [
    (PerTensor(), (4, 6), (4, 6), (1, 1)),
    (PerTensor(), (), (), ()),
    (PerTensor(), (0, 6), (1, 6), (0, 1)),
    (PerChannel(0), (4, 6), (1, 6), (4, 1)),
    (PerChannel(1), (4, 6, 2), (4, 1, 2), (1, 6, 1)),
    (PerChannel(-1), (4, 6), (4, 1), (1, 6)),
    (PerGroup(4), (4, 6), (1, 4), (4, 2)),
    (PerGroup(4), (4, 8), (1, 4), (4, 2)),
    (PerGroup(100), (4, 6), (1, 6), (4, 1)),
    (PerGroup(3, axis=0), (4, 6), (3, 1), (2, 6)),
    (PerGroup(4), (4, 0), (1, 1), (4, 0)),
    (PerToken(), (2, 3, 8), (1, 1, 8), (2, 3, 1)),
    (PerToken(), (8,), (8,), (1,)),
    (PerBlock((2, 4)), (3, 5, 6), (1, 2, 4), (3, 3, 2)),
    (PerBlock((9, 9)), (4, 6), (4, 6), (1, 1)),
]


@pytest.mark.parametrize(("granularity", "shape", "block", "scale"), SHAPES, ids=str)
def test_block_and_scale_shapes(granularity, shape, block, scale):
    assert granularity.block_shape(shape) == block
    assert granularity.scale_shape(shape) == scale


GRANULARITIES = st.one_of(
    st.just(PerTensor()),
    st.just(PerToken()),
    st.builds(PerChannel, st.integers(-2, 1)),
    st.builds(PerGroup, st.integers(1, 300), st.integers(-2, 1)),
    st.builds(PerBlock, st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)),
)


@given(GRANULARITIES, st.lists(st.integers(0, 20), min_size=2, max_size=4).map(tuple))
def test_blocks_cover_the_tensor_and_no_more(granularity, shape):
    sides = zip(shape, granularity.block_shape(shape), granularity.scale_shape(shape), strict=True)
    for n, block, count in sides:
        assert 1 <= block <= max(n, 1)
        assert (count - 1) * block < n <= count * block or n == count == 0


@given(GRANULARITIES)
def test_json_round_trip(granularity):
    data = json.loads(json.dumps(granularity_to_json(granularity)))
    assert granularity_from_json(data) == granularity


@pytest.mark.parametrize(
    "make",
    [
        lambda: PerGroup(0),
        lambda: PerGroup(-1),
        lambda: PerGroup(1 << 31),
        lambda: PerBlock(()),
        lambda: PerBlock((2, 0)),
        lambda: PerChannel(2).block_shape((4, 6)),
        lambda: PerChannel(-3).block_shape((4, 6)),
        lambda: PerGroup(4, axis=2).block_shape((4, 6)),
        lambda: PerToken().block_shape(()),
        lambda: PerBlock((1, 2, 3)).block_shape((4, 6)),
    ],
    ids=[
        "empty-group",
        "negative-group",
        "huge-group",
        "no-block",
        "empty-block",
        "axis-too-large",
        "axis-too-small",
        "group-axis",
        "scalar-token",
        "block-of-more-dimensions",
    ],
)
def test_impossible_granularities_are_refused(make):
    with pytest.raises(UsageError) as error:
        make()
    assert error.value.exit_code == 2


def test_a_block_given_as_a_list_is_hashable():
    assert hash(PerBlock([2, 4])) == hash(PerBlock((2, 4)))


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        (PerTensor(), "per-tensor"),
        (PerChannel(), "per-channel"),
        (PerChannel(1), "per-channel(axis 1)"),
        (PerGroup(32), "per-group(32)"),
        (PerToken(), "per-token"),
        (PerBlock((2, 4)), "per-block(2x4)"),
    ],
    ids=str,
)
def test_text(granularity, text):
    assert str(granularity) == text
