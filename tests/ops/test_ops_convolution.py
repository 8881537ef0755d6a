"""The convolution operator: slow loops as its oracle, torch's checks, the memory that it keeps."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qkit import native, ops
from qkit.numerics import choose_qparams, dequantize, quantize
from qkit.ops import convolutions
from qkit.packing import to_tensors
from qkit.spec import parse

SCHEMES = ["w8a16", "w4a16-g8-asym", "w3a16-tensor"]
# (in, out, kernel, size, stride, padding, dilation, groups, transposed, output padding)
CASES = {
    "1d": (3, 4, (3,), (8,), (2,), (1,), (2,), 1, False, (0,)),
    "1d grouped": (4, 6, (2,), (5,), (1,), (0,), (1,), 2, False, (0,)),
    "2d": (3, 2, (2, 3), (4, 5), (1, 2), (1, 0), (1, 1), 1, False, (0, 0)),
    "3d": (2, 3, (1, 2, 2), (2, 3, 3), (1, 1, 2), (0, 1, 1), (1, 1, 1), 1, False, (0, 0, 0)),
    "1d transposed": (3, 4, (3,), (4,), (2,), (1,), (2,), 1, True, (1,)),
    "2d transposed, grouped": (4, 6, (2, 3), (2, 3), (2, 1), (0, 1), (1, 2), 2, True, (1, 0)),
    "3d transposed": (
        2,
        3,
        (1, 2, 2),
        (2, 2, 3),
        (1, 2, 1),
        (0, 0, 1),
        (1, 1, 1),
        1,
        True,
        (0, 1, 0),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def oracle(x, rows, bias, stride, padding, dilation, groups, transposed, more):
    """One product after the other; ``rows`` is ``[out, in / groups, *kernel]`` either way."""
    (outs, inputs), kernel = rows.shape[:2], rows.shape[2:]
    size = x.shape[2:]
    geometry = list(zip(size, kernel, stride, padding, dilation, more, strict=True))
    if transposed:
        result = [(i - 1) * s - 2 * p + d * (k - 1) + 1 + o for i, k, s, p, d, o in geometry]
    else:
        result = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d, o in geometry]
    y = np.zeros((len(x), outs, *result)) + bias.reshape(1, -1, *[1] * len(kernel))
    places = itertools.product(*map(range, size if transposed else result))
    for place, tap in itertools.product(list(places), list(np.ndindex(*kernel))):
        there = tuple(
            a * s - p + d * t
            for a, t, s, p, d in zip(place, tap, stride, padding, dilation, strict=True)
        )
        limit = result if transposed else size
        if not all(0 <= a < n for a, n in zip(there, limit, strict=True)):
            continue
        source, target = (place, there) if transposed else (there, place)
        for out, i in itertools.product(range(outs), range(inputs)):
            channel = out // (outs // groups) * inputs + i
            y[(slice(None), out, *target)] += (
                x[(slice(None), channel, *source)] * rows[(out, i, *tap)]
            )
    return y


def given(case, scheme: str, dtype=torch.float32, grad: bool = False):
    """The arguments of the operator, and the float rows."""
    c_in, c_out, kernel, size, *geometry = case
    groups = geometry[3]
    spec = parse(scheme).weight
    generator = torch.Generator().manual_seed(1)
    shape = (c_out, c_in // groups, *kernel)
    weight = torch.randn(shape, generator=generator).flatten(1)
    q = quantize(weight, choose_qparams(weight, spec), spec)
    tensors = to_tensors(q, shape)
    x = torch.randn(2, c_in, *size, generator=generator).to(dtype).requires_grad_(grad)
    bias = torch.randn(c_out, generator=generator).to(dtype).requires_grad_(grad)
    stored = tensors["weight" if spec.format.bits == 8 else "weight_packed"]
    args = (
        *(x, stored, tensors["weight_scale"], tensors.get("weight_zero_point"), bias),
        *(spec.format.bits, spec.group_size, list(kernel)),
        *(list(g) if isinstance(g, tuple) else g for g in geometry),
    )
    return args, dequantize(q, torch.float64).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@every_case
def test_the_oracle(case, scheme, dtype):
    args, rows = given(case, scheme, dtype)
    x, bias = args[0].double().numpy(), args[4].double().numpy()
    want = oracle(x, rows.numpy(), bias, *args[8:])
    got = ops.convolution(*args)
    assert (got.dtype, got.shape) == (dtype, want.shape)
    # Each weight and product is rounded once; a sum of n terms in any order errs by n more.
    terms = rows[0].numel() + 3
    size = oracle(abs(x), abs(rows.numpy()), abs(bias), *args[8:])
    assert (abs(got.double().numpy() - want) <= terms * torch.finfo(dtype).eps * size).all()
    one = ops.convolution(args[0][0], *args[1:])
    torch.testing.assert_close(one, got[0])


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym"])
@every_case
def test_opcheck(case, scheme):
    torch.library.opcheck(ops.convolution, given(case, scheme, grad=True)[0])


@every_case
def test_gradcheck(case):
    (x, weight, scale, zero, bias, *how), _ = given(case, "w3a16-tensor", torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: ops.convolution(x, weight, scale, zero, b, *how), (x, bias), fast_mode=True
    )


needs_kernels = pytest.mark.skipif(
    native.library() is None, reason=f"no kernels: {native.status()}"
)


@needs_kernels
@pytest.mark.parametrize("values", [1, 20, 40, 10_000])
@every_case
def test_pieces_change_nothing(case, values, monkeypatch):
    """A large weight is used a few rows at a time, unless it has groups."""
    args, _ = given(case, "w4a16-g8-asym")
    want = ops.convolution(*args)
    monkeypatch.setattr(convolutions, "SCRATCH_VALUES", values)
    monkeypatch.setattr(convolutions, "_kept", threading.local())
    torch.testing.assert_close(ops.convolution(*args), want)
    memory = getattr(convolutions._kept, "memory", None)
    assert memory is None or memory.numel() <= values


@needs_kernels
def test_the_memory_is_kept_and_is_each_threads_own(monkeypatch):
    monkeypatch.setattr(convolutions, "_kept", threading.local())
    args, _ = given(CASES["2d"], "w8a16")
    want = ops.convolution(*args)
    first = convolutions._kept.memory
    ops.convolution(*given(CASES["1d"], "w8a16")[0])
    assert torch.equal(ops.convolution(*args), want)
    seen = []

    def other() -> None:
        for _ in range(20):
            seen.append(torch.equal(ops.convolution(*args), want))
        seen.append(convolutions._kept.memory.data_ptr() != first.data_ptr())

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 63
    assert all(seen)


@needs_kernels
def test_what_inference_mode_leaves_behind_can_be_used(monkeypatch):
    monkeypatch.setattr(convolutions, "_kept", threading.local())
    args, _ = given(CASES["2d"], "w8a16", grad=True)
    with torch.inference_mode():
        want = ops.convolution(*args)
    got = ops.convolution(*args)
    assert torch.equal(got, want)
    got.sum().backward()
    assert args[0].grad is not None


class Mode(TorchDispatchMode):
    """Sees every call, so that none is direct."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "ConvTranspose2d", "Embedding"])
def test_a_direct_call_gives_the_bits_of_the_dispatcher(kind, dtype):
    from qkit.algorithms import rtn
    from qkit.nn import QUANTIZED

    table = kind == "Embedding"
    layer = getattr(torch.nn, kind)(*((6, 5) if table else (6, 4, 3))).to(dtype)
    cls = QUANTIZED[type(layer)]
    rows = cls.rows(layer).detach().flatten(1)
    new = cls.from_float(layer, rtn(rows, parse("w4a16-g8-asym").weight)).requires_grad_(False)
    shape = (2, 6, 7) if kind == "Conv1d" else (2, 6, 7, 5)
    x = torch.randint(0, 6, (2, 3)) if table else torch.randn(shape).to(dtype)
    got = new(x)
    with Mode():
        want = new(x)
    assert torch.equal(got, want)
    assert new._kept.of[1] is not None
