"""The kernels: every instruction set of this machine gives the bits of a slow, obvious loop."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machine import ISAS
from numpy.typing import NDArray
from oracle import dequantize_oracle, pack_oracle

from qkit import native
from qkit.errors import UsageError

KERNELS = native.library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=f"no kernels: {native.status()}")

ROOT = Path(__file__).resolve().parents[1]
SIZES = [1, 3, 7, 8, 9, 31, 33, 64, 129]
BLOCKS = [1, 7, 16, 32, 1000]


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library with one instruction set chosen."""
    assert KERNELS is not None
    before = native.isa()
    if KERNELS.qkit_use(request.param.encode()) is None:
        pytest.skip(f"this machine has no {request.param}")
    yield KERNELS
    KERNELS.qkit_use(before.encode() if before else None)


def at(array: NDArray) -> int:
    return int(array.ctypes.data)


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


def values(rows: int, columns: int) -> NDArray:
    return np.random.default_rng(rows * columns).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", SIZES)
def test_range(kernels, columns, block):
    x = guarded(values(3, columns))
    blocks = -(-columns // block)
    lo, hi = guarded(np.zeros((3, blocks), np.float32)), guarded(np.zeros((3, blocks), np.float32))
    kernels.qkit_range(at(x), 3, columns, block, at(lo), at(hi), 2)
    for r, b in np.ndindex(3, blocks):
        part = x[r, b * block : (b + 1) * block]
        assert (lo[r, b], hi[r, b]) == (min(0, part.min()), max(0, part.max()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", SIZES)
def test_the_range_shows_what_is_not_finite(kernels, columns, bad):
    """Wherever it stands, and in its own block only."""
    for at_column in range(columns):
        x = guarded(values(3, columns))
        x[1, at_column] = bad
        lo, hi = np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32)
        kernels.qkit_range(at(x), 3, columns, columns, at(lo), at(hi), 1)
        assert np.isnan(lo).tolist() == np.isnan(hi).tolist() == [[False], [True], [False]]


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", SIZES)
def test_quantize_and_dequantize(kernels, columns, block, affine):
    x = guarded(values(3, columns))
    blocks, rng = -(-columns // block), np.random.default_rng(columns)
    scale = guarded(rng.choice([-1, 1], (3, blocks)) * rng.uniform(0.1, 1, (3, blocks)))
    scale = guarded(scale.astype(np.float32))
    zero = guarded(rng.integers(-8, 8, (3, blocks)).astype(np.int8)) if affine else None
    codes = guarded(np.zeros((3, columns), np.int8))
    out = guarded(np.zeros((3, columns), np.float32))
    zero_at = None if zero is None else at(zero)
    kernels.qkit_quantize(at(x), 3, columns, block, at(scale), zero_at, -8, 7, at(codes), 2)
    per_value = np.repeat(scale, block, 1)[:, :columns]
    shift = 0 if zero is None else np.repeat(zero, block, 1)[:, :columns].astype(int)
    np.testing.assert_array_equal(codes, np.clip(np.rint(x / per_value) + shift, -8, 7))
    kernels.qkit_dequantize(at(codes), 3, columns, block, at(scale), zero_at, at(out), 2)
    want = dequantize_oracle(codes, scale, zero, (1, block))
    np.testing.assert_array_equal(out, want.astype(np.float32))


def test_rounding_is_half_to_even(kernels):
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999998, 1e30, -1e30]], np.float32)
    codes, scale = np.zeros(x.shape, np.int8), np.ones((1, 1), np.float32)
    kernels.qkit_quantize(at(x), 1, 9, 9, at(scale), None, -8, 7, at(codes), 1)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 3, 7, -8]]


@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", SIZES)
def test_pack_and_unpack(kernels, columns, bits, signed):
    low = -(1 << (bits - 1)) if signed else 0
    rng = np.random.default_rng(columns * bits)
    codes = rng.integers(low, low + (1 << bits), (3, columns))
    words = -(-columns * bits // 32)
    raw = guarded(codes.astype(np.int8 if signed else np.uint8).view(np.uint8))
    stream = guarded(np.full((3, words), -1, np.int32))
    assert kernels.qkit_pack(at(raw), 3, columns, bits, -low, at(stream), words * 4, 2) == 1
    assert stream.tolist() == [pack_oracle(row.tolist(), bits, signed=signed) for row in codes]
    back = guarded(np.zeros((3, columns), np.uint8))
    kernels.qkit_unpack(at(stream), 3, columns, bits, -low, at(back), words * 4, 2)
    np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("columns", SIZES)
def test_a_code_that_does_not_fit_is_told(kernels, columns, bits, signed):
    low = -(1 << (bits - 1)) if signed else 0
    words = -(-columns * bits // 32)
    stream = np.zeros((1, words), np.int32)
    for code in [low + (1 << bits), *([low - 1] if signed else [])]:
        for at_column in range(columns):
            codes = np.full(columns, low, np.int8 if signed else np.uint8)
            codes[at_column] = code
            raw = guarded(codes.view(np.uint8))
            assert not kernels.qkit_pack(at(raw), 1, columns, bits, -low, at(stream), words * 4, 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_that_ask_for_large_pages(kernels, threads):
    """Each result here has several MiB, at an odd address; nothing beyond it is touched."""
    rows, columns, bits = 1301, 4099, 4
    x = values(rows, columns)
    scale = np.random.default_rng(0).uniform(0.2, 0.5, (rows, 1)).astype(np.float32)
    want = np.clip(np.rint(x / scale), -8, 7).astype(np.int8)
    words = -(-columns * bits // 32)

    def fresh(dtype: type, columns: int) -> NDArray:
        room = np.full(rows * columns + 2, 77, dtype)[1:-1].reshape(rows, columns)
        assert room.nbytes > 2 << 20
        return room

    codes, back, out = fresh(np.int8, columns), fresh(np.int8, columns), fresh(np.float32, columns)
    stream = fresh(np.int32, words)
    size = rows, columns
    kernels.qkit_quantize(at(x), *size, columns, at(scale), None, -8, 7, at(codes), threads)
    np.testing.assert_array_equal(codes, want)
    assert kernels.qkit_pack(at(codes), *size, bits, 8, at(stream), words * 4, threads) == 1
    kernels.qkit_unpack(at(stream), *size, bits, 8, at(back), words * 4, threads)
    np.testing.assert_array_equal(back, want)
    kernels.qkit_dequantize(at(codes), *size, columns, at(scale), None, at(out), threads)
    np.testing.assert_array_equal(out, want.astype(np.float32) * scale)
    for result in (codes, back, out, stream):
        assert result.base is not None
        assert (result.base[0], result.base[-1]) == (77, 77)


def test_many_rows_on_many_threads(kernels):
    x = values(700, 260)
    outs = []
    for threads in (1, 2, 7):
        lo, hi = np.zeros((700, 3), np.float32), np.zeros((700, 3), np.float32)
        kernels.qkit_range(at(x), 700, 260, 100, at(lo), at(hi), threads)
        outs.append((lo, hi))
    for lo, hi in outs[1:]:
        np.testing.assert_array_equal(lo, outs[0][0])
        np.testing.assert_array_equal(hi, outs[0][1])


def test_several_python_threads_at_once(kernels):
    codes = np.random.default_rng(0).integers(0, 8, (200, 1000)).astype(np.uint8)
    words = -(-1000 * 3 // 32)
    want = np.zeros((200, words), np.int32)
    kernels.qkit_pack(at(codes), 200, 1000, 3, 0, at(want), words * 4, 1)
    results = [np.zeros_like(want) for _ in range(8)]
    jobs = [
        threading.Thread(
            target=kernels.qkit_pack, args=(at(codes), 200, 1000, 3, 0, at(out), words * 4, 2)
        )
        for out in results
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert all((out == want).all() for out in results)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_pool_is_the_one_that_torch_runs():
    """A second OpenMP library would mean two pools that fight for the cores."""
    count = """
import os, torch, ctypes
torch.set_num_threads(2)
a = torch.randn(512, 512); a @ a
before = len(os.listdir("/proc/self/task"))
from qkit.packing import pack
pack(torch.randint(0, 8, (4096, 512), dtype=torch.uint8), 3)
print(before, len(os.listdir("/proc/self/task")))
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads cannot be counted here")
    before, after = run(count).split()
    assert before == after


def test_isa_can_be_forced_and_switched_off():
    show = "import torch, qkit.native as n; print(n.isa(), '|', n.status())"
    assert run(show, QKIT_ISA="scalar") == "scalar | scalar"
    assert run(show, QKIT_ISA="none") == "None | switched off by QKIT_ISA=none"


def test_an_unknown_isa_is_refused(monkeypatch):
    monkeypatch.setenv("QKIT_ISA", "sse9")
    native._load.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"got: sse9.*wanted: none, scalar"):
            native.status()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_a_library_of_another_interface_is_stale(monkeypatch):
    built = native.ABI
    monkeypatch.setattr(native, "ABI", 999)
    native._load.cache_clear()
    try:
        assert native._load() == (
            None,
            f"stale: built with interface {built}, wanted 999; install qkit again",
        )
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_packing_does_not_depend_on_the_kernels():
    code = """
import torch
from qkit.packing import pack, unpack
torch.manual_seed(0)
codes = torch.randint(-4, 4, (31, 33), dtype=torch.int8)
packed = pack(codes, 3)
assert torch.equal(unpack(packed, 3, 33), codes)
print(packed.sum().item())
"""
    assert run(code, QKIT_ISA="none") == run(code) == run(code, QKIT_ISA="scalar")


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    """torch's pool does not survive a fork; a call in the child must still end, and be right."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    code = """
import os, warnings, torch
from qkit.packing import pack, unpack
torch.set_num_threads(2)
codes = torch.randint(0, 8, (4096, 512), dtype=torch.uint8)
packed = pack(codes, 3)
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads and fork
child = os.fork()
if child == 0:
    same = torch.equal(unpack(packed, 3, 512, signed=False)[:1], codes[:1])
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0"
