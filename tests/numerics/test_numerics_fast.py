"""The kernels give the bits of the torch path, for every shape and granularity that they take."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit import native
from qkit.errors import InputError
from qkit.numerics import QTensor, choose_qparams, dequantize, fast, quantize
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
