"""Corrupt, truncated and hostile sections: always an InputError, never a large allocation."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from golden.make_golden_entropy import CASES, golden_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qkit.errors import InputError
from qkit.packing import entropy
from qkit.packing.entropy import section
from qkit.packing.entropy.section import DTYPES, METHODS, Layout

GOLDEN = {name: golden_bytes(name) for name in CASES}
SMALL = [name for name, data in GOLDEN.items() if len(data) < 400]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", SMALL)
def test_every_flipped_bit_is_found(name):
    data = GOLDEN[name]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match="corrupt"):
            entropy.decode(flipped)


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation_is_found(name):
    for n in range(len(GOLDEN[name])):
        with pytest.raises(InputError, match="corrupt"):
            entropy.decode(GOLDEN[name][:n])


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_behind_the_end_are_refused(name):
    with pytest.raises(InputError, match="bytes of blocks"):
        entropy.decode(GOLDEN[name] + b"\0")


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b"QENT\1" + b)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused(data):
    with pytest.raises(InputError):
        entropy.decode(data)


def opened(data: bytes) -> tuple[Layout, list[bytes]]:
    read = section.read(memoryview(data))
    return read.layout, [bytes(read.part(i)) for i in range(read.layout.blocks)]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes replaced, cut out or put in."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 4)))
    same = draw(st.booleans())
    size = end - start if same else draw(st.integers(0, 4))
    return data[:start] + draw(st.binary(min_size=size, max_size=size)) + data[end:]


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A section that is damaged in one or two places, with every checksum right."""
    layout, parts = opened(GOLDEN[draw(st.sampled_from(list(GOLDEN)))])
    for _ in range(draw(st.integers(1, 2))):
        what = draw(
            st.sampled_from(["table", "part", "inner", "shape", "lanes", "block", "method"])
        )
        if what == "table":
            layout = replace(layout, table=draw(damaged(layout.table)))
        elif what == "part" and parts:
            i = draw(st.integers(0, len(parts) - 1))
            parts[i] = draw(damaged(parts[i]))
        elif what == "inner" and layout.method == "sparse" and parts:
            i = draw(st.integers(0, len(parts) - 1))
            try:
                inner, inner_parts = opened(parts[i])
            except InputError:
                continue
            count = draw(st.integers(0, 3 * inner.elements))
            method = draw(st.sampled_from([inner.method, "sparse", "raw"]))
            parts[i] = section.write(
                replace(inner, shape=(count,), method=method),
                [draw(damaged(part)) for part in inner_parts],
            )
        elif what == "shape":
            side = st.integers(0, draw(st.sampled_from([4, 3000, 1 << 20])))
            shape = tuple(draw(st.lists(side, max_size=2)))
            layout = replace(layout, shape=shape, dtype=draw(st.sampled_from(DTYPES)))
        elif what == "lanes":
            layout = replace(layout, lanes_log2=draw(st.integers(0, 5)))
        elif what == "block":
            layout = replace(layout, block_log2=draw(st.integers(0, 16)))
        elif what == "method":
            layout = replace(layout, method=draw(st.sampled_from(METHODS)))
    return section.write(layout, parts)


def outcome(data: bytes) -> NDArray | None:
    try:
        return entropy.decode(data, max_elements=1 << 24)
    except InputError:
        return None


def test_numpy_and_kernels_refuse_and_accept_the_same(use):
    use("native")  # skips here, not within an example
    accepted = 0

    @given(hostile())
    @settings(max_examples=500, deadline=None, database=None)
    def check(data: bytes) -> None:
        nonlocal accepted
        use("numpy")
        want = outcome(data)
        accepted += want is not None
        for way in ("scalar", "native"):
            use(way)
            got = outcome(data)
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(got, want)

    check()
    assert accepted  # or nothing has been compared


@pytest.mark.usefixtures("way")
@given(hostile())
@settings(max_examples=150, deadline=None)
def test_hostile_sections_raise_nothing_else(data):
    outcome(data)


HUGE = {
    "more-than-the-index": ("ans", (1 << 40,)),
    "raw": ("raw", (1 << 40,)),
    "sparse": ("sparse", (1 << 40,)),
    "beyond-64-bits": ("huffman", (1 << 63, 1 << 63, 1 << 63)),
    "hidden-by-zero": ("raw", (0, 1 << 63)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", HUGE)
def test_a_stated_size_allocates_nothing(case, monkeypatch):
    method, shape = HUGE[case]
    name = {"raw": "raw", "sparse": "sparse"}.get(method, method)
    layout, parts = opened(GOLDEN[name])
    monkeypatch.setattr(section, "MAX_ELEMENTS", 1 << 200)
    data = section.write(replace(layout, shape=shape), parts)
    monkeypatch.undo()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="corrupt"):
            entropy.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_caller_can_bound_the_elements():
    data = entropy.encode(np.zeros((10, 10), np.int8))
    assert entropy.decode(data, max_elements=100).shape == (10, 10)
    with pytest.raises(InputError, match="too many elements"):
        entropy.decode(data, max_elements=99)


def test_no_memory_is_an_input_error(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(entropy.coder.DECODERS, "raw", fail)
    with pytest.raises(InputError, match="no memory"):
        entropy.decode(GOLDEN["raw"])


def test_a_later_version_is_named():
    with pytest.raises(InputError, match="version 2"):
        entropy.decode(GOLDEN["raw"][:4] + b"\2" + GOLDEN["raw"][5:])
