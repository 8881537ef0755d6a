"""Range estimation: equal to slow oracles on all of the data, however the data are cut."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import (
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

from qkit.errors import InputError, UsageError
from qkit.numerics import (
    OBSERVERS,
    Observer,
    choose_qparams,
    dequantize,
    qparams_from_range,
    quantize,
)
from qkit.numerics.histogram import LEAST_EXPONENT, Histogram
from qkit.numerics.observers import Entropy, MinMax, MovingAverage, Mse, Percentile
from qkit.numerics.search import divergence, squared_error
from qkit.spec import BF16, Int, PerChannel, PerGroup, PerTensor, PerToken, QSpec

SYM8 = QSpec(Int(8, narrow=True), PerTensor())
AFFINE8 = QSpec(Int(8), PerTensor(), symmetric=False)
SYM4 = QSpec(Int(4), PerTensor())
AFFINE4 = QSpec(Int(4), PerTensor(), symmetric=False)
SPECS = [SYM8, AFFINE8, SYM4, AFFINE4, replace(AFFINE4, format=Int(2, signed=False))]
KINDS = list(OBSERVERS)
# The kinds that promise the same answer for any order and any batches.
FOLDS = [name for name in KINDS if name != "moving-average"]
SIZES = [1, 3, 7, 31, 33]

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=True)
arrays = hnp.arrays(np.float32, st.sampled_from([*SIZES, 100]), elements=floats)


def name_of(value: object) -> str:
    if isinstance(value, QSpec):
        return f"{value.format}-{'sym' if value.symmetric else 'affine'}"
    return str(value).removeprefix("torch.")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learnt(kind: str, spec: QSpec, *batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    observer = Observer(OBSERVERS[kind](), spec)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def assert_same(one, two) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b)


# ---- the histogram


def histogram_oracle(x: np.ndarray, bins: int) -> tuple[dict[int, int], int]:
    """Counts by cell, and the exponent, in exact rational arithmetic."""
    values = [Fraction(float(v)) for v in x]
    peak = max(abs(v) for v in values)
    exponent = math.frexp(float(peak))[1] if peak else LEAST_EXPONENT
    width = Fraction(2) ** exponent / bins
    counts: dict[int, int] = {}
    for v in values:
        cell = 0 if v == 0 else (math.floor(abs(v) / width) + 1) * (1 if v > 0 else -1)
        counts[cell] = counts.get(cell, 0) + 1
    return counts, exponent


@settings(max_examples=100)
@given(arrays, st.integers(0, 100), st.sampled_from([2, 8, 64]))
def test_histogram_equals_oracle_in_one_batch_and_in_two(x, cut, bins):
    counts, exponent = histogram_oracle(x, bins)
    rows = torch.from_numpy(x)[None]
    made = [Histogram.of(rows, bins)]
    if 0 < cut < len(x):
        made.append(Histogram.of(rows[:, :cut], bins) + Histogram.of(rows[:, cut:], bins))
    for histogram in made:
        found = {
            int(cell): int(n)
            for cell, n in zip(histogram.cells, histogram.counts[0], strict=True)
            if n
        }
        assert (found, int(histogram.exponent)) == (counts, exponent)
        assert histogram.n == len(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_histogram_spans_the_whole_range_of_every_dtype(dtype):
    info = torch.finfo(dtype)
    tiny = torch.tensor([[info.smallest_normal, -info.smallest_normal, 0.0]], dtype=dtype)
    large = torch.tensor([[info.max, info.min, 1.0]], dtype=dtype)
    histogram = Histogram.of(tiny, 8) + Histogram.of(large, 8)
    assert histogram.counts.tolist() == Histogram.of(torch.cat([tiny, large], 1), 8).counts.tolist()
    assert histogram.counts[0, [0, 7, 8, 9, 16]].tolist() == [1, 1, 1, 2, 1]


def test_channels_grow_by_themselves():
    rows = torch.stack([randn(33), 1e-9 * randn(33, seed=1), 1e9 * randn(33, seed=2)])
    grown = Histogram.of(rows * 1e-3, 16) + Histogram.of(rows, 16)
    for c in range(3):
        alone = Histogram.of(torch.cat([rows[c] * 1e-3, rows[c]])[None], 16)
        assert torch.equal(grown.counts[c], alone.counts[0])
        assert torch.equal(grown.width[c], alone.width[0])


@given(arrays)
def test_values_are_within_half_a_width_of_the_data(x):
    histogram = Histogram.of(torch.from_numpy(x)[None], 16)
    values, counts = histogram.channel(0)
    assert counts.sum() == len(x)
    represented = np.repeat(values.numpy(), counts.long().numpy())
    # Both are sorted by cell, so matching them in order keeps each within its cell.
    distance = np.abs(represented - np.sort(x.astype(np.float64)))
    within = np.abs(values.numpy()[:, None] - x.astype(np.float64)).min(0)
    assert within.max() <= float(histogram.width) / 2
    assert distance.max() <= float(histogram.width)
    assert (values == 0).sum() == (x == 0).any()


# ---- what all kinds promise


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_order_and_batch_size_do_not_matter(kind, spec):
    x = torch.cat([randn(700), 30 * randn(7, seed=1), torch.zeros(33)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    expected = learnt(kind, spec, x)
    for size in SIZES:
        assert_same(learnt(kind, spec, *x.split(size)), expected)
        assert_same(learnt(kind, spec, *x.flip(0).split(size)), expected)
    assert_same(learnt(kind, spec, *x.sort().values.split(31)), expected)


@pytest.mark.parametrize("kind", FOLDS)
@settings(max_examples=20)
@given(arrays, st.integers(1, 40))
def test_any_data_in_any_batches(kind, x, size):
    x = torch.from_numpy(x)
    expected = learnt(kind, AFFINE4, x)
    assert_same(learnt(kind, AFFINE4, *x.split(size)), expected)
    lo, hi = expected
    assert min(float(x.min()), 0) <= lo <= 0 <= hi <= max(float(x.max()), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_channel_is_as_if_alone(kind, axis):
    x = randn(3, 7, 5) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    y = randn(3, 7, 5, seed=1)
    spec = replace(AFFINE4, granularity=PerChannel(axis))
    lo, hi = learnt(kind, spec, x, y)
    assert lo.shape == hi.shape == spec.granularity.scale_shape(x.shape)
    for c in range(x.shape[axis]):
        alone = learnt(kind, AFFINE4, x.select(axis, c), y.select(axis, c))
        assert_same((lo.flatten()[c].reshape(1, 1), hi.flatten()[c].reshape(1, 1)), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize(
    ("data", "lo", "hi"),
    [
        (torch.zeros(7), 0, 0),
        (torch.full((31,), 3.3), 0, 3.3),
        (torch.full((33,), -0.7), -0.7, 0),
        (torch.tensor([1e-42]), 0, 1e-42),
        (torch.tensor(2.5), 0, 2.5),
    ],
    ids=["zero", "constant", "negative", "denormal", "scalar"],
)
def test_stated_answers(kind, spec, data, lo, hi):
    found = learnt(kind, spec, data)
    expected = torch.tensor([lo, hi], dtype=torch.float32).double()
    assert torch.equal(torch.cat([side.flatten() for side in found]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_data_have_a_range_that_ends_at_zero(kind, sign):
    x = sign * (randn(999).abs() + 10)
    lo, hi = learnt(kind, AFFINE8, x)
    near, far = (lo, hi) if sign == 1 else (hi, lo)
    assert near == 0
    assert 0 < sign * far <= float(x.abs().max())


@pytest.mark.parametrize("kind", FOLDS)
def test_negated_data_have_the_negated_range(kind):
    x = randn(500) + 0.5
    spec = SYM8 if kind in ("mse", "entropy") else AFFINE8
    lo, hi = learnt(kind, spec, x)
    assert_same(learnt(kind, spec, -x), (-hi, -lo))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_do_nothing(kind):
    x = randn(5, 33)
    expected = learnt(kind, AFFINE8, x)
    empty = torch.zeros(0, 33)
    assert_same(learnt(kind, AFFINE8, empty, x, empty), expected)
    observer = Observer(OBSERVERS[kind](), AFFINE8, "fc1.input")
    observer.update(empty)
    with pytest.raises(UsageError, match=r"before any data .*fc1\.input"):
        observer.range()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind, bad):
    observer = Observer(OBSERVERS[kind](), AFFINE8, "fc1.input")
    observer.update(randn(33))
    before = observer.range()
    with pytest.raises(InputError, match=r"not finite .*fc1\.input"):
        observer.update(torch.tensor([1.0, bad]))
    with pytest.raises(InputError, match="floating-point"):
        observer.update(torch.tensor([1, 2]))
    assert_same(observer.range(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_narrow_and_wide_floats_are_taken_as_they_are(kind, dtype):
    x = randn(333).to(dtype)
    lo, hi = learnt(kind, AFFINE8, x.requires_grad_())
    assert_same((lo, hi), learnt(kind, AFFINE8, x.detach().double()))
    assert not lo.requires_grad


@pytest.mark.parametrize("granularity", [PerToken(), PerGroup(32)], ids=str)
def test_dynamic_and_group_ranges_are_not_learnt(granularity):
    with pytest.raises(UsageError, match="choose_qparams"):
        Observer(MinMax(), replace(SYM8, granularity=granularity))


def test_floats_have_no_range():
    with pytest.raises(UsageError, match="only integer formats"):
        Observer(MinMax(), QSpec(BF16, PerTensor()))


def test_batches_of_other_channels_are_refused():
    observer = Observer(MinMax(), replace(SYM8, granularity=PerChannel(-1)), "conv")
    observer.update(randn(4, 3))
    observer.update(randn(7, 3))
    with pytest.raises(InputError, match=r"not like those before .*conv"):
        observer.update(randn(4, 5))
    with pytest.raises(InputError, match="not like those before"):
        observer.update(randn(2, 4, 3))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MovingAverage, {"constant": 0.0}),
        (MovingAverage, {"constant": 1.5}),
        (Percentile, {"percentile": 0.0}),
        (Percentile, {"percentile": 100.1}),
        (Percentile, {"percentile": math.nan}),
        (Mse, {"bins": 1000}),
        (Entropy, {"bins": 1}),
    ],
)
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(UsageError):
        kind(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_data(kind):
    observer = Observer(OBSERVERS[kind](), AFFINE8)

    def size() -> int:
        state = observer.state
        parts = state if isinstance(state, tuple) else vars(state).values()
        return sum(part.numel() * part.element_size() for part in parts)

    observer.update(randn(1))
    before = size()
    for i in range(5):
        observer.update(100.0**i * randn(1000, seed=i))
    assert size() == before


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(kind):
    x = randn(200, 1001)
    spec = replace(AFFINE4, granularity=PerChannel(0))
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found += [(*learnt(kind, AFFINE4, x), *learnt(kind, spec, x[:7]))]
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


# ---- each kind


@given(arrays)
def test_minmax_gives_the_qparams_of_the_whole(x):
    x = torch.from_numpy(x)
    found = qparams_from_range(*learnt("minmax", AFFINE8, *x.split(7)), AFFINE8)
    expected = choose_qparams(x, AFFINE8)
    assert torch.equal(found.scale.flatten(), expected.scale.flatten())
    assert torch.equal(found.zero_point.flatten(), expected.zero_point.flatten())


@pytest.mark.filterwarnings("ignore:.*reduce_range.*", "ignore:.*is deprecated.*")
@pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
def test_moving_average_is_that_of_torch(constant):
    batches = [randn(5, 3, seed=i) + 3 for i in range(6)]
    for theirs, granularity in (
        (MovingAverageMinMaxObserver(constant), PerTensor()),
        (MovingAveragePerChannelMinMaxObserver(constant, ch_axis=1), PerChannel(1)),
    ):
        ours = Observer(MovingAverage(constant), replace(AFFINE8, granularity=granularity))
        for batch in batches:
            theirs(batch)
            ours.update(batch)
        torch.testing.assert_close(ours.state.lo, theirs.min_val.double().reshape(-1))
        torch.testing.assert_close(ours.state.hi, theirs.max_val.double().reshape(-1))
        assert (ours.range()[0] == 0).all()


@settings(max_examples=100)
@given(arrays, st.sampled_from([1, 50, 90, 99, 99.9, 100]), st.sampled_from([4, 64, 4096]))
def test_percentile_is_the_order_statistic_up_to_one_bin(x, percentile, bins):
    observer = Observer(Percentile(bins, percentile), AFFINE8)
    for part in torch.from_numpy(x).split(7):
        observer.update(part)
    lo, hi = (float(side) for side in observer.range())
    ordered = sorted(map(float, x))
    clipped = math.floor(len(x) * (100 - Fraction(str(percentile))) / 200)
    width = float(observer.state.width)
    assert width <= 2 * max(abs(ordered[0]), abs(ordered[-1])) / bins or not any(ordered)
    below, above = min(ordered[clipped], 0.0), max(ordered[-1 - clipped], 0.0)
    assert lo <= below
    assert hi >= above
    # An end that zero decides is exact.
    assert below - lo <= width
    assert hi - above <= width
    assert sum(v < lo for v in ordered) <= clipped
    assert sum(v > hi for v in ordered) <= clipped
    if clipped == 0:
        assert (lo, hi) == (min(ordered[0], 0.0), max(ordered[-1], 0.0))


def test_a_percentile_is_meant_as_written():
    x = torch.arange(1, 2001.0)
    observer = Observer(Percentile(percentile=99.9), AFFINE8)
    observer.update(x)  # one value per side
    assert 1999 <= float(observer.range()[1]) < 2000


def true_rmse(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, spec: QSpec) -> float:
    """Root mean square error of quantizing the data themselves."""
    one = replace(spec, granularity=PerTensor())
    qparams = qparams_from_range(lo.reshape(1), hi.reshape(1), one)
    x = x.double().flatten()
    return float((dequantize(quantize(x, qparams, one), torch.float64) - x).square().mean().sqrt())


DISTRIBUTIONS = {
    "normal": randn(3000),
    "relu": randn(3000).relu(),
    "heavy": randn(3000) ** 5,
    "shifted": randn(3000) + 2,
    "outlier": torch.cat([randn(3000), torch.tensor([60.0])]),
    "few": randn(7),
}


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("bins", [64, 4096])
@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_mse_is_within_one_bin_of_the_best_range(x, bins, spec):
    observer = Observer(Mse(bins), spec)
    observer.update(x)
    width = float(observer.state.width)
    found = true_rmse(x, *observer.range(), spec)
    least, greatest = x.min().double().clamp(max=0), x.max().double().clamp(min=0)
    assert found <= true_rmse(x, least, greatest, spec) + width
    if spec.symmetric:  # every threshold that was tried, by hand
        for i in range(89):
            limit = max(-least, greatest) * 2 ** (-i / 8)
            tried = true_rmse(x, least.clamp(min=-limit), greatest.clamp(max=limit), spec)
            assert found <= tried + width
    else:  # a grid of both ends, which the search does not promise to beat: 3 % are allowed
        lows = {float(least) * 2 ** (-i / 4) for i in range(16)}
        highs = {float(greatest) * 2 ** (-i / 4) for i in range(16)}
        best = min(
            true_rmse(x, torch.tensor(a, dtype=torch.float64), torch.tensor(b), spec)
            for a in lows
            for b in highs
        )
        assert found <= 1.03 * best + width


@given(arrays, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(SPECS))
def test_the_error_on_the_histogram_is_that_on_the_data_up_to_half_a_bin(x, a, b, spec):
    x = torch.from_numpy(x)
    histogram = Histogram.of(x[None], 64)
    lo = a * histogram.lo.clamp(max=0)
    hi = b * histogram.hi.clamp(min=0)
    error = squared_error(spec, *histogram.channel(0), histogram.width, lo, hi)
    slack = float(histogram.width) / 2 + 1e-6 * float(x.abs().max())
    assert abs(float(error.sqrt()) - true_rmse(x, lo, hi, spec)) <= slack


def divergence_oracle(
    values: list[float], counts: list[float], lo: float, hi: float, spec: QSpec
) -> float:
    """The definition, cell by cell."""
    qparams = qparams_from_range(
        torch.tensor([lo], dtype=torch.float64), torch.tensor([hi], dtype=torch.float64), spec
    )
    scale = float(qparams.scale)
    zero = 0 if qparams.zero_point is None else int(qparams.zero_point)
    cells = [(v, n) for v, n in zip(values, counts, strict=True) if v != 0]
    inside = [(v, n) for v, n in cells if lo <= v <= hi]
    total, kept = sum(n for _, n in cells), sum(n for _, n in inside)
    p = [n for _, n in inside]
    p[0] += sum(n for v, n in cells if v < lo)
    p[-1] += sum(n for v, n in cells if v > hi)
    fmt = spec.format
    codes = [min(max(round(v / scale) + zero, fmt.qmin), fmt.qmax) for v, _ in inside]
    result = 0.0
    for code, mine in zip(codes, p, strict=True):
        same = [n for other, (_, n) in zip(codes, inside, strict=True) if other == code]
        q = sum(same) / len(same) / kept
        result += mine / total * math.log(mine / total / q)
    return result


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_divergence_equals_oracle(x, spec):
    histogram = Histogram.of(x[None], 1024)
    values, counts = histogram.channel(0)
    ratios = torch.tensor([1.0, 0.83, 0.5, 0.31], dtype=torch.float64)
    lo, hi = histogram.lo.clamp(max=0) * ratios, histogram.hi.clamp(min=0) * ratios
    found = divergence(spec, values, counts, torch.tensor(0.0), lo, hi)
    expected = [
        divergence_oracle(values.tolist(), counts.tolist(), float(a), float(b), spec)
        for a, b in zip(lo, hi, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_entropy_clips_an_outlier_but_not_scarce_data():
    x = torch.cat([randn(100_000), torch.tensor([50.0])])
    lo, hi = learnt("entropy", SYM8, x)
    assert 3 < hi < 8
    assert -5 < lo < -3
    few = randn(33)
    assert_same(learnt("entropy", SYM8, few), learnt("minmax", SYM8, few))


def test_entropy_does_not_see_exact_zeros():
    x = randn(20_000).abs()
    assert_same(learnt("entropy", AFFINE8, x, torch.zeros(100_000)), learnt("entropy", AFFINE8, x))


def test_entropy_never_takes_a_step_finer_than_a_bin():
    x = torch.cat([randn(1000), torch.tensor([1e4])])
    observer = Observer(Entropy(256), SYM8)
    observer.update(x)
    step = qparams_from_range(*observer.range(), SYM8).scale
    assert step >= observer.state.width
