"""The parts of entropy coding: code lengths, canonical codes, frequencies, gaps."""

from __future__ import annotations

import ctypes
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit import native
from qkit.errors import InputError
from qkit.packing.entropy import compiled, sparse
from qkit.packing.entropy.ans import MAX_BITS, MIN_BITS, Ans, cost, normalise
from qkit.packing.entropy.huffman import (
    MAX_LENGTH,
    Huffman,
    canonical_codes,
    code_lengths,
    reverse_bits,
)

WEIGHTS = st.lists(st.integers(0, 10**6), min_size=256, max_size=256).filter(any)
# Few, or of very different sizes: what strains a limit.
STEEP = st.lists(st.integers(0, 40).map(lambda e: 2**e), min_size=2, max_size=256)


def kraft(lengths: list[int]) -> Fraction:
    return sum((Fraction(1, 2**n) for n in lengths if n), Fraction(0))


def total(weights: list[int], lengths: list[int]) -> int:
    return sum(w * n for w, n in zip(weights, lengths, strict=True))


def padded(weights: list[int]) -> np.ndarray:
    return np.array(weights + [0] * (256 - len(weights)), np.int64)


@given(st.one_of(WEIGHTS, STEEP))
@settings(max_examples=60, deadline=None)
def test_lengths_fulfil_krafts_equality(weights):
    lengths = code_lengths(weights)
    assert [n > 0 for n in lengths] == [w > 0 for w in weights]
    assert max(lengths) <= MAX_LENGTH
    present = sum(w > 0 for w in weights)
    assert kraft(lengths) == (1 if present > 1 else Fraction(1, 2))


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.integers(3, 4))
@settings(max_examples=60, deadline=None)
def test_package_merge_is_the_brute_force_optimum(weights, limit):
    every = itertools.product(range(1, limit + 1), repeat=len(weights))
    best = min(total(weights, lengths) for lengths in every if kraft(lengths) <= 1)
    assert total(weights, code_lengths(weights, limit)) == best


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
@settings(deadline=None)
def test_without_pressure_the_limit_costs_nothing(weights):
    """Huffman's own algorithm: the cost is the sum of all merged weights."""
    heap, huffman = sorted(weights), 0
    while len(heap) > 1:
        merged = heap[0] + heap[1]
        huffman += merged
        heap = sorted([*heap[2:], merged])
    assert total(weights, code_lengths(weights, 39)) == huffman


def test_the_limit_binds_on_fibonacci_weights():
    weights = [1, 1]
    while len(weights) < 30:
        weights.append(weights[-1] + weights[-2])
    assert max(code_lengths(weights, 40)) == 29
    assert max(code_lengths(weights)) == MAX_LENGTH
    assert kraft(code_lengths(weights)) == 1


def test_canonical_codes_of_the_rfcs_example():
    """RFC 1951, section 3.2.2: ABCDEFGH with the lengths (3, 3, 3, 3, 3, 2, 4, 4)."""
    lengths = np.array([3, 3, 3, 3, 3, 2, 4, 4], np.uint8)
    codes = canonical_codes(lengths)
    words = [f"{c:0{n}b}" for c, n in zip(codes.tolist(), lengths.tolist(), strict=True)]
    assert words == ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    backwards = reverse_bits(codes, lengths).tolist()
    assert [f"{c:0{n}b}"[::-1] for c, n in zip(backwards, lengths.tolist(), strict=True)] == words


@given(st.one_of(WEIGHTS, STEEP))
@settings(max_examples=30, deadline=None)
def test_huffman_table_round_trips(weights):
    code = Huffman.from_counts(padded(weights))
    assert Huffman.from_table(code.to_table()).lengths.tolist() == code.lengths.tolist()


@pytest.mark.parametrize(
    "lengths",
    [[], [2], [1, 2], [1, 1, 1], [13] * 2, [15, 1], [12] * 256, [1, 2, 3, 0]],
    ids=str,
)
def test_incomplete_codes_are_refused(lengths):
    table = Huffman(padded(lengths).astype(np.uint8)).to_table()
    if 0 in lengths:  # a present symbol without a code
        table = bytes([15]) + table[1:]
    with pytest.raises(InputError):
        Huffman.from_table(table)


@given(st.one_of(WEIGHTS, STEEP), st.integers(MIN_BITS, MAX_BITS))
@settings(max_examples=60, deadline=None)
def test_frequencies_add_up_and_keep_present_symbols(weights, bits):
    f = normalise(padded(weights), bits)
    assert f.sum(dtype=np.int64) == 1 << bits
    assert ((f > 0) == (padded(weights) > 0)).all()


@given(st.lists(st.integers(1, 10**5), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_exchange_of_a_unit_lowers_the_cost_much(weights):
    """Webster's rule is the optimum up to the second order of 1 / f."""
    counts, bits = padded(weights), MIN_BITS
    f = normalise(counts, bits)
    ours = cost(counts, f, bits)
    for i, j in itertools.permutations(range(len(weights)), 2):
        if f[i] > 1:
            other = f.copy()
            other[i] -= 1
            other[j] += 1
            assert cost(counts, other, bits) >= ours * (1 - 1e-3)


@given(st.one_of(WEIGHTS, STEEP))
@settings(max_examples=30, deadline=None)
def test_ans_table_round_trips(weights):
    coder = Ans.from_counts(padded(weights))
    again = Ans.from_table(coder.to_table())
    assert (again.bits, again.frequencies.tolist()) == (coder.bits, coder.frequencies.tolist())


@pytest.mark.parametrize(
    ("frequencies", "bits"),
    [([4096], 11), ([65535, 1], 16), ([4095], 12), ([4096, 1], 12), ([], 12), ([4096, 0], 12)],
    ids=str,
)
def test_frequencies_that_do_not_add_up_are_refused(frequencies, bits):
    table = Ans(padded(frequencies).astype(np.uint16), bits).to_table()
    if 0 in frequencies:  # a present symbol without a frequency
        table = bytes([bits, 3]) + table[2:] + bytes(2)
    with pytest.raises(InputError):
        Ans.from_table(table)


@given(st.lists(st.integers(0, 1100), max_size=6), st.integers(0, 800), st.integers(0, 255))
@settings(deadline=None)
def test_gaps_of_any_length(gaps, tail, background):
    values = [(background + 1 + i) % 256 for i in range(len(gaps))]
    runs = [[background] * g + [v] for g, v in zip(gaps, values, strict=True)]
    symbols = np.array([s for run in runs for s in run] + [background] * tail, np.uint8)
    stored, kept = sparse.split(symbols, background)
    assert kept.tolist() == values
    want = [b for g in gaps for b in [255] * (g // 255) + [g % 255]] + [255] * (tail // 255)
    assert stored.tolist() == want
    out = np.empty_like(symbols)
    sparse.join(stored, kept, background, out)
    assert out.tolist() == symbols.tolist()


@pytest.mark.parametrize(
    ("gaps", "values", "n"),
    [
        ([3], [1], 3),  # beyond the end
        ([3], [], 4),  # a value is missing
        ([3], [1, 1], 4),  # a value is left
        ([255], [], 254),
        ([255], [], 510),  # a whole escape is missing
        ([], [], 255),
        ([0] * 5, [1] * 5, 4),
    ],
)
def test_gaps_that_do_not_fill_are_refused(gaps, values, n):
    out = np.empty(n, np.uint8)
    with pytest.raises(InputError, match="do not fill"):
        sparse.join(np.array(gaps, np.uint8), np.array(values, np.uint8), 0, out)


def test_a_library_without_the_coders_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert compiled.library() is None
    monkeypatch.setattr(native, "library", lambda: ctypes.CDLL(None))
    assert compiled.library() is None
