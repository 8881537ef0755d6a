"""The kernels give the bits of the torch path, for every shape and granularity that they take."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit import native
from qkit.errors import InputError, UsageError
from qkit.numerics import QTensor, choose_qparams, dequantize, fast, quantize, quantize_minmax
from qkit.packing import pack, unpack
from qkit.spec import (
    BF16,
    FP16,
    FP32,
    Int,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QSpec,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.status())

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(1),
    PerGroup(7),
    PerGroup(5, axis=0),
    PerToken(),
    PerBlock((2, 4)),
]
FORMATS = [(Int(8, narrow=True), True), (Int(4), True), (Int(4), False), (Int(2), True)]


@contextmanager
def least(values: int):
    """Only tensors of at least so many values go to the kernels."""
    before = fast.MIN_VALUES, fast.MIN_RUN
    fast.MIN_VALUES = fast.MIN_RUN = values
    try:
        yield
    finally:
        fast.MIN_VALUES, fast.MIN_RUN = before


def both(x: torch.Tensor, spec: QSpec) -> list[tuple[QTensor, torch.Tensor]]:
    results = []
    for values in (0, 1 << 60):
        with least(values):
            q = quantize(x, choose_qparams(x, spec), spec)
            results.append((q, dequantize(q)))
    return results


def assert_equal(x: torch.Tensor, spec: QSpec) -> None:
    (kernel, decoded), (plain, reference) = both(x, spec)
    assert torch.equal(kernel.qparams.scale, plain.qparams.scale)
    assert torch.equal(kernel.codes, plain.codes)
    assert torch.equal(decoded, reference)
    for values in (0, 1 << 60):
        with least(values):
            at_once = quantize_minmax(x, spec)
        assert torch.equal(at_once.codes, plain.codes)
        assert torch.equal(at_once.qparams.scale, plain.qparams.scale)
        zero_point = plain.qparams.zero_point
        if zero_point is not None:
            assert torch.equal(at_once.qparams.zero_point, zero_point)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.sampled_from(GRANULARITIES),
    st.sampled_from(FORMATS),
    st.sampled_from([FP32, FP16, BF16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
)
def test_equal_bits(shape, granularity, fmt, scale, dtype, flipped):
    dims = len(shape)
    if isinstance(granularity, PerChannel) and granularity.axis >= dims:
        return
    if isinstance(granularity, PerBlock) and len(granularity.shape) > dims:
        return
    x = torch.randn(shape).to(dtype)
    x = x.transpose(0, -1) if flipped else x
    assert_equal(x, QSpec(fmt[0], granularity, fmt[1], scale=scale))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(128)], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (33, 1000), (4096, 3), (3, 16384)], ids=str)
def test_equal_bits_of_larger_tensors(shape, granularity):
    assert_equal(torch.randn(shape), QSpec(Int(4), granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1023, 2000, -1])
def test_both_refuse_what_is_not_finite(place, bad, granularity):
    x = torch.randn(33, 70)
    x.view(-1)[place] = bad
    spec = QSpec(Int(4), granularity, symmetric=False)
    for values in (0, 1 << 60):
        with least(values), pytest.raises(InputError, match=r"fc\.weight; got: .*of 2310 values"):
            choose_qparams(x, spec, name="fc.weight")
        with least(values), pytest.raises(InputError, match=r"fc\.weight; got: .*of 2310 values"):
            quantize_minmax(x, spec, name="fc.weight")


@pytest.mark.parametrize("symmetric", [True, False])
def test_both_refuse_a_range_that_overflows(symmetric):
    x = torch.full((33, 70), 3e38)
    x[::2] *= -1
    x[5] = 3.4e38
    x[5, 0] = -3.4e38
    spec = QSpec(Int(2 if symmetric else 8), PerChannel(0), symmetric=symmetric)
    refusals = []
    for values in (0, 1 << 60):
        with least(values):
            for run in (choose_qparams, quantize_minmax):
                try:
                    run(x, spec)
                    refusals.append(None)
                except InputError as error:
                    refusals.append(str(error))
    assert len(set(refusals)) == 1


@pytest.mark.parametrize("values", [0, 1 << 60], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_go_into_memory_that_is_given(values, dtype):
    x, spec = torch.randn(33, 70), QSpec(Int(4), PerGroup(32))
    q, codes = quantize_minmax(x, spec), torch.empty(33, 70, dtype=torch.int8)
    words, back = torch.empty(33, 9, dtype=torch.int32), torch.empty_like(codes)
    decoded = torch.empty(33, 70, dtype=dtype)
    with least(values):
        assert quantize_minmax(x, spec, out=codes).codes is codes
        assert torch.equal(codes, q.codes)
        assert quantize(x, q.qparams, spec, out=codes.zero_()).codes is codes
        assert torch.equal(codes, q.codes)
        assert dequantize(q, dtype, out=decoded) is decoded
        assert torch.equal(decoded, dequantize(q, dtype))
        assert pack(codes, 4, out=words) is words
        assert torch.equal(words, pack(codes, 4))
        assert unpack(words, 4, 70, out=back) is back
        assert torch.equal(back, codes)
        turned = torch.empty(5, 70, dtype=torch.int32)
        assert torch.equal(pack(codes, 4, axis=0, out=turned), pack(codes, 4, axis=0))
        assert torch.equal(unpack(turned, 4, 33, axis=0, out=back), codes)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(33, 71, dtype=torch.int8),
        torch.empty(33, 70, dtype=torch.uint8),
        torch.empty(70, 33, dtype=torch.int8).T,
    ],
    ids=["shape", "dtype", "strides"],
)
def test_memory_that_does_not_fit_is_refused(out):
    x, spec = torch.randn(33, 70), QSpec(Int(4), PerGroup(32))
    q = quantize_minmax(x, spec)
    for call in (
        lambda: quantize_minmax(x, spec, out=out),
        lambda: quantize(x, q.qparams, spec, out=out),
        lambda: dequantize(q, out=out),
        lambda: pack(q.codes, 4, out=out),
        lambda: unpack(pack(q.codes, 4), 4, 70, out=out),
    ):
        with pytest.raises(UsageError, match="does not fit in out"):
            call()


def test_the_kernels_really_run(monkeypatch):
    """Else the tests above would compare torch with torch."""
    called = []
    kernels = native.library()

    class Spy:
        def __getattr__(self, name):
            called.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(native, "library", Spy)
    spec = QSpec(Int(8, narrow=True), PerChannel(0))
    x = torch.randn(8, 2048)
    dequantize(quantize(x, choose_qparams(x, spec), spec))
    assert called == ["qkit_range", "qkit_quantize", "qkit_dequantize"]
    called.clear()
    quantize_minmax(x, spec)
    assert called == ["qkit_quantize_minmax"]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(32)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(granularity):
    x, spec = torch.randn(128, 1024), QSpec(Int(4), granularity)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            q = quantize(x, choose_qparams(x, spec), spec)
            packed = pack(q.codes, 4)
            results.append(
                (q.codes, q.qparams.scale, dequantize(q), packed, unpack(packed, 4, 1024))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_under_vmap_the_torch_path_is_taken():
    spec = QSpec(Int(8, narrow=True), PerTensor())
    codes = quantize(torch.randn(4, 2048), choose_qparams(torch.randn(4, 2048), spec), spec)
    from qkit.numerics import dequantize_blocks

    scale = torch.rand(3, 1, 1)
    stacked = torch.vmap(lambda s: dequantize_blocks(codes.codes, s, None, (4, 2048)))(scale)
    assert torch.equal(stacked[1], dequantize_blocks(codes.codes, scale[1], None, (4, 2048)))
