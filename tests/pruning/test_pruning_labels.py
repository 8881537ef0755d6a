"""Labels through views, against the labels of every single element, moved by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.pruning.labels import FROZEN, Labels, Layout, pointwise


def elements(layout: Layout) -> list[np.ndarray]:
    """The label of every element, by factor: a slow loop over all of them."""
    found = []
    for axes, ids in layout.factors:
        full = np.zeros(layout.shape, np.int64)
        for at in np.ndindex(*layout.shape):
            full[at] = ids[tuple(at[axis] for axis in axes)]
        found.append(full)
    return found


def fresh(shape: tuple[int, ...], *axes: int) -> Layout:
    labels = Labels()
    return Layout.of(labels, shape, {axis: labels.fresh(shape[axis]) for axis in axes})


def factors_of(size: int, draw: st.DrawFn) -> list[int]:
    parts = []
    while size > 1:
        part = draw(st.sampled_from([n for n in range(2, size + 1) if size % n == 0]))
        parts.append(part)
        size //= part
    return parts


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    new = factors_of(math.prod(shape), draw)
    for _ in range(draw(st.integers(0, 2))):
        new.insert(draw(st.integers(0, len(new))), 1)
    return shape, tuple(new), draw(st.integers(0, len(shape) - 1))


@given(reshapes())
def test_a_view_moves_labels_as_it_moves_values(case):
    shape, new, axis = case
    layout = fresh(shape, axis)
    before = elements(layout)
    after = elements(layout.reshaped(new))
    assert len(after) == len(before)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.reshape(new), other)


@given(st.permutations(range(4)), st.integers(0, 3))
def test_a_permutation_moves_labels_as_it_moves_values(order, axis):
    shape = (2, 3, 4, 2)
    layout = fresh(shape, axis)
    moved = layout.moved([shape[k] for k in order], {old: new for new, old in enumerate(order)})
    np.testing.assert_array_equal(elements(layout)[0].transpose(order), elements(moved)[0])


def test_heads_are_settled_where_something_sums_over_their_size():
    layout = fresh((2, 12), 1).reshaped((2, 3, 4))
    heads, size = layout.ids(1), layout.ids(2)
    assert len(set(heads)) == 3
    assert not size.any()
    back = layout.reshaped((2, 12)).ids(1)
    np.testing.assert_array_equal(back, np.repeat(heads, 4))


def test_a_sum_over_the_size_of_heads_keeps_whole_heads():
    layout = fresh((2, 12), 1).reshaped((2, 3, 4))
    assert not layout.ids(2).any()
    assert len(set(layout.ids(1))) == 3


def test_a_channel_shuffle_that_nothing_settles_goes_by_the_finer_part():
    labels = Labels()
    ids = labels.fresh(12)
    layout = Layout.of(labels, (2, 12), {1: ids})
    shuffled = layout.reshaped((2, 2, 6)).moved((2, 6, 2), {0: 0, 1: 2, 2: 1}).reshaped((2, 12))
    labels.close()
    assert len(set(labels.find(ids))) == 6  # pairs: one of each half
    np.testing.assert_array_equal(labels.find(ids)[:6], labels.find(ids)[6:])
    np.testing.assert_array_equal(shuffled.ids(1), np.repeat(labels.find(ids)[:6], 2))


def test_an_addition_joins_labels_and_freezes_what_meets_the_frozen():
    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(4)
    out = pointwise(
        labels,
        [Layout.of(labels, (2, 4), {1: a}), Layout.of(labels, (4,), {0: b})],
        (2, 4),
    )
    np.testing.assert_array_equal(labels.find(a), labels.find(b))
    np.testing.assert_array_equal(out.ids(1), labels.find(a))
    pointwise(labels, [out, Layout(labels, (2, 4))], (2, 4))
    assert (labels.find(a) == FROZEN).all()


def test_what_is_repeated_along_an_axis_says_nothing_about_it():
    labels = Labels()
    ids = labels.fresh(4)
    pointwise(labels, [Layout.of(labels, (2, 4), {1: ids}), Layout(labels, (2, 1))], (2, 4))
    assert len(set(labels.find(ids))) == 4


@pytest.mark.parametrize("seed", range(5))
def test_joining_is_the_partition_of_a_slow_flood(seed):
    random = np.random.default_rng(seed)
    labels = Labels()
    labels.fresh(40)
    pairs = random.integers(0, 41, (2, 30))
    labels.join(pairs[0], pairs[1])
    slow = {n: n for n in range(41)}
    for _ in range(41):
        for a, b in pairs.T:
            low = min(slow[a], slow[b])
            for n, own in list(slow.items()):
                if own in (slow[a], slow[b]):
                    slow[n] = low
    np.testing.assert_array_equal(labels.find(np.arange(41)), [slow[n] for n in range(41)])


def test_one_coordinate_cannot_be_removed():
    assert fresh((1, 3), 0).ids(0)[0] == FROZEN
