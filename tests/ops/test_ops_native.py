"""The kernels of the linear layer, on every instruction set of this machine.

The tolerances are those of kernels/qkit.h, with u = 2^-24. By floats: a weight (code - zero) *
scale is rounded once, and the K products are summed by fused steps in L >= 4 lanes, which are then
added up in pairs. So, for fp32,

    |error| <= (K / 4 + 8) u (sum|x||w| + |bias|)

By integers (INTEGERS): x becomes x', 23 bits (15 of bf16) below the greatest of its 512 columns,
the products are exact, and floats enter only where a piece (what a group and a block of 512
columns have in common) ends. So, with d = 2^-22.9 (2^-14.9) max|x| of the block, where
|x'| <= |x| + d,

    |error| <= sum d |w| + (pieces + 4) u (sum (|x| + d) (|code| + |zero|) |scale| + |bias|)
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from machine import ISAS
from numpy.typing import NDArray

from qkit import native, ops
from qkit.numerics import QParams, QTensor, choose_qparams, dequantize, quantize
from qkit.ops import native as kernels
from qkit.ops import reference
from qkit.packing import to_tensors
from qkit.spec import BF16, FP16, PerGroup, parse

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no kernels: {native.status()}")

SCHEMES = [
    *(f"w{bits}a16-{kind}" for bits in (4, 8) for kind in ("g32", "g64", "g128", "channel")),
    *(f"w{bits}a16-{kind}-asym" for bits in (4, 8) for kind in ("g32", "g64", "g128", "channel")),
    *(f"w{bits}a16-g32-asym" for bits in (1, 2, 3, 5, 6, 7)),
    *(f"w{bits}a16-{kind}-asym" for bits in (3, 4, 8) for kind in ("g5", "g6", "g7", "g8", "g12")),
    "w4a16-tensor",
    "w8a16-tensor-asym",
    "w3a16-tensor",
    "w4a16-g1000",
]
FEW = ["w8a16", "w8a16-g32-asym", "w4a16-g32", "w4a16-g5-asym", "w3a16-g8", "w3a16-tensor-asym"]
# The instruction sets where exact activations go by integers, and columns that share a scale there.
INTEGERS = ("avx512vnni",)
BLOCK = 512
# Around every width of a vector, of a tile, and a word that is not full.
COLUMNS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 65, 129, 511, 512, 513, 1030]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY is not None
    before = native.isa()
    if LIBRARY.qkit_use(request.param.encode()) is None:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    LIBRARY.qkit_use(before.encode() if before else None)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """A stored weight: its exact values, their (|code| + |zero|) |scale|, and how it is stored."""

    exact: torch.Tensor
    size: torch.Tensor
    weight: tuple  # weight, scale, zero point
    how: tuple[int, int]  # bits, group


def stored(scheme: str, rows: int, columns: int, scale=None) -> Case:
    spec = parse(scheme).weight
    spec = spec if scale is None else replace(spec, scale=scale)
    matrix = randn(rows, columns, seed=1)
    q = quantize(matrix, choose_qparams(matrix, spec), spec)
    tensors = to_tensors(q, (rows, columns))
    weight = tensors["weight" if spec.format.bits == 8 else "weight_packed"]
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    parameters = weight, tensors["weight_scale"], tensors.get("weight_zero_point")
    zero = q.qparams.zero_point
    minus = QParams(q.qparams.scale.abs(), None if zero is None else -zero.to(torch.int16).abs())
    size = dequantize(QTensor(q.codes.to(torch.int16).abs(), minus, spec), torch.float64)
    return Case(dequantize(q, torch.float64), size, parameters, (spec.format.bits, group))


def bound(isa: str, given: torch.Tensor, case: Case, bias: torch.Tensor | None) -> torch.Tensor:
    """The bound at the top of this file, for inputs ``given`` [rows, columns]."""
    x, columns = given.double(), given.shape[1]
    added = 0 if bias is None else bias.double().abs()
    if isa not in INTEGERS:
        return (columns / 4 + 8) * 2.0**-24 * (x.abs() @ case.exact.abs().t() + added)
    group = case.how[1] or columns
    pieces = len({*range(0, columns, BLOCK), *range(0, columns, group)})
    most = torch.empty_like(x)
    for k in range(0, columns, BLOCK):
        most[:, k : k + BLOCK] = x[:, k : k + BLOCK].abs().amax(1, keepdim=True)
    d = 2.0 ** (-14.9 if given.dtype == torch.bfloat16 else -22.9) * most
    size = (x.abs() + d) @ case.size.t() + added
    return d @ case.exact.abs().t() + (pieces + 4) * 2.0**-24 * size


def check(
    x: torch.Tensor, case: Case, isa: str | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernels' result, which is within the bound at the top of this file."""
    got = kernels.linear(x, *case.weight, bias, *case.how)
    assert got is not None, "the reference would have run"
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], case.exact.shape[0]))
    assert isa is not None
    wide = x.double().reshape(-1, x.shape[-1])
    want = wide @ case.exact.t() + (0 if bias is None else bias.double())
    inside = 1.01 * bound(isa, x.reshape(wide.shape), case, bias) if len(wide) else want
    info = torch.finfo(x.dtype)
    outside = 0 if x.dtype == torch.float32 else info.eps / 2 * (want.abs() + inside) + info.tiny
    error = (got.double().reshape(want.shape) - want).abs()
    assert (error <= inside + outside).all(), f"{(error / (inside + outside)).max():.2f} x bound"
    return got


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme, isa):
    bias = randn(13, seed=2)
    for columns in (96, 300):
        case = stored(scheme, 13, columns)
        for rows in (1, 5):
            check(randn(rows, columns), case, isa, bias)


@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_number_of_columns(columns, scheme, isa):
    check(randn(3, columns), stored(scheme, 7, columns), isa)


@pytest.mark.parametrize("scheme", ["w8a16-g32-asym", "w4a16-g32"])
def test_every_number_of_rows_and_outputs(scheme, isa):
    for outputs in (*range(1, 14), 25):
        check(randn(2, 40), stored(scheme, outputs, 40), isa, randn(outputs, seed=2))
    case = stored(scheme, 7, 40)
    for rows in (*range(10), 63, 64, 65, 130, 192, 300):
        check(randn(rows, 40), case, isa, randn(7, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, FP16, BF16], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_dtypes_of_inputs_and_scales(scheme, scale, dtype, isa):
    case = stored(scheme, 9, 70, scale)
    for shape in ((70,), (2, 70), (2, 0, 70), (2, 3, 70)):
        check(randn(*shape).to(dtype), case, isa, randn(9, seed=2).to(dtype))


@pytest.mark.parametrize("scheme", FEW)
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(scheme, isa):
    _, _, weight, how = stored(scheme, 101, 1030)
    x, threads = randn(300, 1030), torch.get_num_threads()
    want = kernels.linear(x, *weight, None, *how)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(kernels.linear(x, *weight, None, *how), want)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(0, 1), slice(3, 5), slice(60, 70), slice(1, 299)):
        assert torch.equal(kernels.linear(x[part], *weight, None, *how), want[part])


@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("columns", [1, 7, 33, 600])
def test_dequantize_has_the_bits_of_the_reference(columns, scheme, isa):
    _, _, weight, how = stored(scheme, 9, columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = kernels.dequantize(*weight, *how, columns, dtype)
        assert got is not None
        assert got.dtype == dtype
        assert torch.equal(got, reference.dequantize(*weight, *how, columns, dtype))


def test_infinite_inputs_stay_in_their_row(isa):
    _, _, weight, how = stored("w4a16-g32", 9, 70)
    x = randn(6, 70)
    want = kernels.linear(x, *weight, None, *how)
    x[2, 69], x[4, 3] = torch.inf, torch.nan
    got = kernels.linear(x, *weight, None, *how)
    assert not got[2].isfinite().any()
    assert got[4].isnan().all()
    for row in (0, 1, 3, 5):
        assert torch.equal(got[row], want[row])


def guarded(array: NDArray) -> NDArray:
    """A copy that ends where a page that may not be touched begins."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
    whole = np.frombuffer(memory, np.uint8, array.nbytes, room - array.nbytes)
    copy = whole.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# Every kind of activations (what they give is tested in test_ops_integer.py).
ACTS = [
    native.Acts(kernels.EXACT, 0, 0, 0.0, 0),
    native.Acts(kernels.SYMMETRIC, -127, 127, 0.0, 0),
    native.Acts(kernels.AFFINE, -128, 127, 0.0, 0),
    native.Acts(kernels.STATIC, -128, 127, 0.03, -5),
]


@pytest.mark.parametrize("columns", [1, 5, 9, 16, 23, 31, 40, 519])
@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_outside_the_buffers_is_touched(bits, columns, isa):
    """Rows of whole bytes only, which is shorter than the stored layout's whole words."""
    assert LIBRARY is not None
    n, stride, rng = 7, -(-columns * bits // 8), np.random.default_rng(bits * columns)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, columns)).astype(np.int8)
    stream = guarded(np.zeros((n, stride), np.uint8))
    offset = 0 if bits == 8 else 1 << (bits - 1)
    LIBRARY.qkit_pack(codes.ctypes.data, n, columns, bits, offset, stream.ctypes.data, stride, 1)
    for block, rows in ((columns, 1), (6, 3), (5, 4), (16, 6)):
        blocks = -(-columns // block)
        scale = guarded(rng.uniform(0.5, 1, (n, blocks)).astype(np.float32))
        zero = guarded(rng.integers(-3, 3, (n, blocks)).astype(np.int8))
        x = guarded(rng.normal(size=(rows, columns)).astype(np.float32))
        bias, out = guarded(np.ones(n, np.float32)), guarded(np.zeros((rows, n), np.float32))
        weight = guarded(np.zeros((n, columns), np.float32))
        pointers = scale.ctypes.data, zero.ctypes.data, None, bias.ctypes.data
        form = native.Weight(stream.ctypes.data, n, columns, stride, block, bits, 0, *pointers)
        at, index = ctypes.addressof(form), guarded(np.array([n - 1, 0, 3], np.int64))
        assert LIBRARY.qkit_decode(at, None, n, 0, weight.ctypes.data, 2) == 0
        shift = np.repeat(zero, block, 1)[:, :columns].astype(int)
        per_value = np.repeat(scale, block, 1)[:, :columns]
        np.testing.assert_array_equal(weight, (codes - shift).astype(np.float32) * per_value)
        some = guarded(np.zeros((3, columns), np.float32))
        assert LIBRARY.qkit_decode(at, index.ctypes.data, 3, 0, some.ctypes.data, 2) == 0
        np.testing.assert_array_equal(some, weight[index])
        for acts in ACTS:
            arguments = ctypes.addressof(acts), x.ctypes.data, 0, rows, out.ctypes.data, 2
            assert LIBRARY.qkit_linear(at, *arguments) == 0
            if acts.kind == kernels.EXACT:
                exact = torch.from_numpy(weight.astype(float))
                size = (np.abs(codes) + np.abs(shift)) * per_value.astype(float)
                case = Case(exact, torch.from_numpy(size), (), (bits, block))
                given, ones = torch.from_numpy(x), torch.ones(n)
                error = (torch.from_numpy(out) - (given.double() @ exact.t() + 1)).abs()
                assert (error <= 1.01 * bound(isa, given, case, ones)).all()


# ---------------------------------------------------------------- who runs


def test_what_ran_is_counted():
    _, _, weight, how = stored("w4a16-g32", 9, 70)
    with ops.count_calls() as calls:
        ops.linear(randn(2, 70), *weight, None, *how)
        ops.linear(randn(2, 70).bfloat16(), *weight, None, *how)
        ops.linear(randn(2, 70).double(), *weight, None, *how)
        ops.dequantize(*weight, *how, 70, torch.float32)
        ops.dequantize(*weight, *how, 70, torch.float64)
    assert calls == {
        f"qkit::linear[{native.isa()}]": 2,
        "qkit::linear[reference]": 1,
        f"qkit::dequantize[{native.isa()}]": 1,
        "qkit::dequantize[reference]": 1,
    }


def test_what_the_kernels_do_not_read_is_left_to_the_reference():
    _, _, (weight, scale, zero), (bits, group) = stored("w4a16-g32-asym", 9, 70)
    x, bias = randn(2, 70), randn(9)
    good = (x, weight, scale, zero, bias, bits, group)
    assert kernels.linear(*good) is not None
    for at, other in [
        (0, x.double()),
        (0, x.int()),
        (0, x[:, :40]),
        (1, weight.to(torch.int64)),
        (1, weight[:, :-1]),
        (1, weight[:-1]),
        (2, scale.double()),
        (2, scale[:, :-1]),
        (2, scale[:1, :1]),
        (3, zero.int()),
        (3, zero[:, :-1]),
        (4, bias.double()),
        (4, bias[:-1]),
        (5, 5),
        (5, 9),
        (5, 0),
        (6, 16),
        (6, -1),
    ]:
        assert kernels.linear(*good[:at], other, *good[at + 1 :]) is None, f"argument {at}: {other}"


def test_without_kernels_the_reference_runs(monkeypatch):
    _, _, weight, how = stored("w4a16-g32", 9, 70)
    want = ops.linear(randn(2, 70), *weight, None, *how)
    monkeypatch.setattr(native, "library", lambda: None)
    with ops.count_calls() as calls:
        got = ops.linear(randn(2, 70), *weight, None, *how)
    assert calls == {"qkit::linear[reference]": 1}
    torch.testing.assert_close(got, want)


def test_weights_that_are_not_contiguous():
    case = stored("w4a16-g32-asym", 9, 70)
    weight, scale, zero = case.weight
    wide = torch.stack([weight, weight], 2)[..., 0]
    apart = case._replace(weight=(wide, scale.t().contiguous().t(), zero.t().contiguous().t()))
    got = check(randn(70, 4).t(), apart, native.isa())
    assert torch.equal(got, check(randn(70, 4).t(), case, native.isa()))


def test_a_large_batch_that_is_nowhere_finite():
    """Each such row takes scratch memory; in a process of its own, which too much would end."""
    code = """
import torch
from qkit import ops
codes = torch.ones(64, 1024, dtype=torch.int8)
x = torch.full((2000, 1024), torch.nan)
print(bool(ops.linear(x, codes, torch.ones(64, 1), None, None, 8, 0).isnan().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
