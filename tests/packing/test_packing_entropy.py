"""Entropy coding: exact round trips, near the bound, the same bytes with and without kernels."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle_entropy import decode_oracle

from qkit.errors import UsageError
from qkit.packing import entropy
from qkit.packing.entropy import alphabet

METHODS = ["auto", "raw", "huffman", "ans", "sparse"]
# Sizes of a whole section, relative to the entropy of its codes.
ANS_BOUND, HUFFMAN_BOUND = 1.01, 1.02


def gaussian(kind: str, n: int = 1 << 20) -> NDArray[np.int8]:
    """Codes of a normal weight."""
    x = np.random.default_rng(7).normal(size=n)
    if kind == "int8":  # one scale for all
        return np.round(x / np.abs(x).max() * 127).astype(np.int8)
    if kind == "int8-narrow":
        return np.round(x * 20).clip(-127, 127).astype(np.int8)
    if kind == "int4-clipped":
        return np.round(x * 2.2).clip(-7, 7).astype(np.int8)
    groups = x.reshape(-1, 128)  # int4: one scale for each group of 128
    return np.round(groups / np.abs(groups).max(1, keepdims=True) * 7).astype(np.int8).ravel()


@st.composite
def arrays(draw: st.DrawFn) -> NDArray:
    dtype = draw(st.sampled_from([np.int8, np.uint8]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    fill = draw(st.sampled_from([None, st.just(0), st.just(3)]))
    return draw(hnp.arrays(dtype, shape, fill=fill))


def same(a: NDArray, b: NDArray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool((a == b).all())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("method", METHODS)
@given(codes=arrays(), block_log2=st.sampled_from([0, 3, 16]))
@settings(max_examples=40, deadline=None)
def test_any_array_round_trips(method, codes, block_log2):
    data = entropy.encode(codes, method, block_log2=block_log2)
    assert same(entropy.decode(data), codes)
    assert same(decode_oracle(data), codes)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 3, 7, 31, 33, 1023, 1025, 2049, 5000])
def test_every_length_round_trips(n, method, dtype):
    codes = np.random.default_rng(n).binomial(9, 0.4, n).astype(dtype)
    for block_log2 in (10, 16):
        data = entropy.encode(codes, method, block_log2=block_log2)
        assert same(entropy.decode(data), codes)
    assert same(decode_oracle(data), codes)


PATTERNS = {
    "one-symbol": np.full(70_000, 9, np.uint8),
    "all-symbols": np.arange(70_000).astype(np.uint8),
    "all-symbols-skewed": (np.arange(70_000) ** 2 // 19_000_000).astype(np.uint8),
    "one-in-70000": (np.arange(70_000) == 65_536).astype(np.uint8),
    "rare-symbols": np.where(np.arange(70_000) % 300, 0, np.arange(70_000) // 300 % 256).astype(
        np.uint8
    ),
    "powers": np.repeat(np.arange(17), [1 << max(0, i - 1) for i in range(17)]).astype(np.uint8),
    "long-gaps": (np.arange(70_000) % 511 == 0).astype(np.uint8),
    "gaps-at-the-escape": np.isin(
        np.arange(3000), np.cumsum([254, 255, 256, 257, 510, 511])
    ).astype(np.uint8),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_extreme_patterns_round_trip(pattern, method):
    codes = PATTERNS[pattern]
    assert same(entropy.decode(entropy.encode(codes, method)), codes)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::-1, 3:], lambda x: x[2:3]],
    ids=["transposed", "every-other", "reversed", "one-row"],
)
def test_non_contiguous_arrays(view, method):
    codes = view(np.random.default_rng(0).integers(-8, 8, (37, 50)).astype(np.int8))
    assert same(entropy.decode(entropy.encode(codes, method)), codes)


def test_tensors_are_taken_as_arrays_are():
    codes = torch.arange(-60, 60, dtype=torch.int8).reshape(4, 30).t()
    data = entropy.encode(codes)
    assert data == entropy.encode(codes.numpy())
    assert torch.equal(torch.from_numpy(entropy.decode(data)), codes)
    assert same(entropy.decode(entropy.encode(torch.tensor(5, dtype=torch.uint8))), np.uint8(5))


@pytest.mark.parametrize("method", ["huffman", "ans", "sparse"])
@pytest.mark.parametrize("n", [1, 1500, 40_000, 65_536, 200_000])
def test_kernels_and_numpy_write_the_same_bytes(n, method, use):
    sections = []
    for way in ("numpy", "native"):
        use(way)
        sections.append(
            [
                entropy.encode(codes, method)
                for codes in (gaussian("int8", n), PATTERNS["rare-symbols"][:n])
            ]
        )
    assert sections[0] == sections[1]
    for data in sections[0]:
        use("numpy")
        decoded = entropy.decode(data)
        for way in ("scalar", "native"):
            use(way)
            assert same(decoded, entropy.decode(data))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("method", METHODS)
def test_threads_change_nothing(method):
    codes = gaussian("int4-clipped", 150_001)
    sections = {entropy.encode(codes, method, block_log2=11, threads=t) for t in (1, 3)}
    assert len(sections) == 1
    for threads in (None, 1, 3):
        assert same(entropy.decode(next(iter(sections)), threads=threads), codes)


@pytest.mark.parametrize("kind", ["int4", "int4-clipped", "int8", "int8-narrow"])
def test_gaussian_codes_come_near_the_entropy(kind, use):
    use("native")
    stats = entropy.stats(gaussian(kind))
    assert 2 < stats.entropy < (4 if kind.startswith("int4") else 8)
    assert stats.entropy < stats.bits["ans"] <= ANS_BOUND * stats.entropy
    assert stats.entropy < stats.bits["huffman"] <= HUFFMAN_BOUND * stats.entropy
    assert stats.best == "ans"


def test_skewed_codes_show_the_floor_of_huffman(use):
    use("native")
    codes = (np.random.default_rng(0).random(1 << 20) < 0.01).astype(np.uint8)
    stats = entropy.stats(codes)
    assert stats.entropy == pytest.approx(0.081, abs=0.002)
    assert stats.bits["huffman"] > 1
    assert stats.bits["ans"] < 1.25 * stats.entropy


def test_sparse_takes_advantage_of_structure(use):
    """2 of 4: the order-0 entropy does not see the pattern, the gaps do."""
    use("native")
    rng = np.random.default_rng(0)
    order = rng.random((1 << 16, 4)).argsort(1)
    codes = np.where(order < 2, 0, rng.choice([-2, -1, 1, 2], (1 << 16, 4))).astype(np.int8)
    stats = entropy.stats(codes)
    assert stats.best == "sparse"
    assert stats.bits["sparse"] < 0.98 * stats.entropy


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["noise", *PATTERNS])
def test_auto_is_the_smallest(kind):
    noise = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    codes = PATTERNS.get(kind, noise)
    stats, data = entropy.stats(codes), entropy.encode(codes)
    share = np.bincount(codes).max() / codes.size
    assert list(stats.bits) == METHODS[1 : 5 if share >= 0.25 else 4]
    assert len(data) == min(len(entropy.encode(codes, method)) for method in stats.bits)
    assert data == entropy.encode(codes, stats.best)
    for method, bits in stats.bits.items():
        assert bits * codes.size == pytest.approx(8 * len(entropy.encode(codes, method)))
    if kind == "noise":
        assert stats.best == "raw"


def test_stats_of_known_codes():
    empty = entropy.stats(np.zeros((0, 4), np.int8))
    assert (empty.elements, empty.entropy, empty.best) == (0, 0.0, "raw")
    uniform = entropy.stats(np.arange(256, dtype=np.uint8))
    assert (uniform.entropy, uniform.elements, uniform.best) == (8.0, 256, "raw")
    assert entropy.stats(np.array([3, 3, 3, 7], np.int8)).entropy == pytest.approx(0.811278)


@given(hnp.arrays(np.uint8, st.integers(0, 300)))
def test_counts(symbols):
    assert alphabet.counts(symbols).tolist() == [(symbols == s).sum() for s in range(256)]


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.bool_])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match="codes are int8 or uint8"):
        entropy.encode(np.zeros(3, dtype))
    with pytest.raises(UsageError, match="codes are int8 or uint8"):
        entropy.encode(torch.zeros(3, dtype=torch.bfloat16))


def test_other_requests_are_refused():
    codes = np.zeros(3, np.int8)
    with pytest.raises(UsageError, match="unknown coding"):
        entropy.encode(codes, "zip")
    with pytest.raises(UsageError, match=r"2\^0 to 2\^16"):
        entropy.encode(codes, block_log2=17)
    with pytest.raises(UsageError, match="too many dimensions"):
        entropy.encode(torch.zeros([1] * 33, dtype=torch.int8).numpy())
