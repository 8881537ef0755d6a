"""The eager call without the dispatcher: the same bits, and never where somebody watches."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qkit import native, ops
from qkit.algorithms import rtn
from qkit.nn import QLinear
from qkit.nn.layer import CODES
from qkit.numerics import qparams_from_range
from qkit.ops import eager
from qkit.spec import BF16, FP16, parse

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.status()}")

SCHEMES = [
    *("w8a16", "w4a16-g8-asym", "w4a16-tensor", "nf4-g8", "fp8", "fp8-g8"),
    *("w8a8", "w4a8-g8", "w8a8-static"),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(scheme: str, dtype=torch.float32, scale=None, bias: bool = True) -> QLinear:
    layer, wanted = nn.Linear(21, 5, bias=bias).to(dtype), parse(scheme)
    spec = wanted.weight
    spec = spec if scale is None else replace(spec, scale=scale)
    given = None
    if wanted.input is not None and wanted.input.when == "static":
        given = qparams_from_range(torch.tensor([[-2.0]]), torch.tensor([[2.5]]), wanted.input)
    new = QLinear.from_float(layer, rtn(layer.weight.detach(), spec), wanted.input, given)
    return new.eval().requires_grad_(False)


@pytest.fixture
def direct(monkeypatch):
    """Calls of the kernels by layers themselves, as a list that grows."""
    done, call = [], eager.linear

    def watched(*args):
        out = call(*args)
        if out is not None:
            done.append(args[0])
        return out

    monkeypatch.setattr(eager, "linear", watched)
    return done


def dispatched(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """What the operators give: a mode sees every call."""
    with Mode():
        return layer(x)


def agrees(layer: QLinear, x: torch.Tensor, direct: list) -> None:
    """One direct call, with the dispatcher's bits."""
    direct.clear()
    got = layer(x)
    assert len(direct) == 1
    want = dispatched(layer, x)
    assert len(direct) == 1
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@schemes
def test_the_bits_of_the_dispatcher(scheme, dtype, direct):
    for bias in (True, False):
        layer = layer_of(scheme, dtype, bias=bias)
        for lead in ((), (1,), (3,), (2, 0), (2, 3)):
            agrees(layer, torch.randn(*lead, 21).to(dtype), direct)
        agrees(layer, torch.randn(21, 3).to(dtype).t(), direct)


def test_fp64_and_other_inputs_go_through_the_dispatcher(direct):
    layer = layer_of("w8a16")
    layer(torch.randn(2, 21).double())
    layer(nn.Parameter(torch.randn(2, 21), requires_grad=False))
    for wrong in (torch.ones(2, 21, dtype=torch.int64), torch.randn(2, 20), torch.randn(())):
        with pytest.raises((RuntimeError, IndexError)):
            layer(wrong)
    assert direct == []


class Mode(TorchDispatchMode):
    """Remembers the operators of qkit."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "qkit" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "qkit" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Mode, Functions])
@schemes
def test_a_mode_sees_every_call(scheme, mode, direct):
    layer = layer_of(scheme)
    with mode() as watching:
        layer(torch.randn(2, 21))
    assert len(watching.seen) == 1
    assert direct == []


@schemes
def test_gradients_are_recorded(scheme, direct):
    layer, x = layer_of(scheme), torch.randn(2, 21, requires_grad=True)
    assert layer(x).requires_grad
    layer.bias.requires_grad_()
    assert layer(x.detach()).requires_grad
    assert direct == []
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert len(direct) == 2


def test_the_profiler_names_the_operator(direct):
    layer = layer_of("w8a16")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(2, 21))
    assert "qkit::linear" in {event.key for event in profile.key_averages()}
    assert direct == []


@schemes
def test_vmap(scheme, direct):
    layer, x = layer_of(scheme), torch.randn(3, 2, 21)
    got = torch.func.vmap(layer)(x)
    assert direct == []
    torch.testing.assert_close(got, layer(x))


@schemes
def test_compile_export_and_trace_record_the_operator(scheme, direct):
    layer, x = layer_of(scheme), torch.randn(2, 21)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    program = torch.export.export(layer, (x,))
    loose = torch.export.export(layer, (x,), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns of every comparison of sizes
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert direct == []
    for exported in (program, loose):
        assert any("qkit.linear" in str(node.target) for node in exported.graph.nodes)
    assert "qkit::linear" in str(traced.inlined_graph)
    want = layer(x)
    for got in (compiled, program.module()(x), loose.module()(x), traced(x)):
        assert torch.equal(got, want)


def test_a_negated_view_is_read_as_what_it_is():
    layer, x = layer_of("w8a16"), torch.randn(2, 21)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


# ---------------------------------------------------------------- what is kept


def names_of(layer: QLinear) -> list[str]:
    return [n for n, t in [*layer._buffers.items(), *layer._parameters.items()] if t is not None
            and "shape" not in n]  # fmt: skip


@pytest.mark.parametrize("through", ["in place", "data"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, FP16, BF16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16-asym", "w4a16-g8-asym", "nf4-g8", "w8a8", "w8a8-static"])
def test_changes_in_place_are_seen(scheme, scale, dtype, through, direct):
    layer, x = layer_of(scheme, dtype, scale), torch.randn(3, 21).to(dtype)
    for name in names_of(layer):
        before = layer(x)
        tensor = getattr(layer, name)
        target = tensor.data if through == "data" else tensor
        if name == "input_zero_point":
            target.fill_(127)  # clips all that is positive; less may change nothing
        else:
            target.copy_(tensor.flip(0) if tensor.dim() and tensor.shape[0] > 1 else tensor * 2)
        agrees(layer, x, direct)
        assert not torch.equal(layer(x), before), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_tensors_in_the_place_of_old_ones_are_seen(dtype, direct):
    """Freed memory and freed objects are used again, often at once."""
    layer, x = layer_of("w8a16", dtype), torch.randn(3, 21).to(dtype)
    for step in range(20):
        layer(x)
        layer.bias = None
        layer.bias = nn.Parameter(torch.full((5,), float(step), dtype=dtype), requires_grad=False)
        agrees(layer, x, direct)


@schemes
def test_to_load_copy_and_pickle(scheme, direct):
    layer, other, x = layer_of(scheme), layer_of(scheme), torch.randn(3, 21)
    layer(x), other(x)
    want = other(x)
    for same in (copy.deepcopy(other), copy.copy(other), again(other)):
        assert torch.equal(same(x), want)
        agrees(same, x, direct)
    for assign in (False, True):
        layer(x)
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        layer.requires_grad_(False)
        assert torch.equal(layer(x), want)
        agrees(layer, x, direct)
    copied = copy.deepcopy(other)
    copied(x)
    copied.weight_scale.mul_(2)
    assert torch.equal(other(x), want), "a copy's weight is its own"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        agrees(layer, x.to(dtype), direct)
    with torch.no_grad():
        assert layer.to("meta")(x.to("meta")).is_meta


def again(layer: QLinear) -> QLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_functional_calls_use_the_tensors_given(direct):
    layer, other, x = layer_of("w8a16"), layer_of("w8a16"), torch.randn(3, 21)
    want = layer(x), other(x)
    names = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, names, (x,)), want[1])
    assert torch.equal(layer(x), want[0])


def test_a_large_weight_is_asked_to_be_kept_once(direct, monkeypatch):
    kept, keep = [], eager.native.keep

    def watched(kernels, weight):
        kept.append(weight)
        keep(kernels, weight)

    monkeypatch.setattr(eager.native, "keep", watched)
    layer = nn.Linear(1100, 4100)
    layer = QLinear.from_float(layer, rtn(layer.weight.detach(), parse("w8a16").weight)).eval()
    layer.requires_grad_(False)
    codes = layer._buffers[CODES].clone()
    assert codes.nbytes > eager.native.KEPT_BYTES
    x = torch.randn(2, 1100)
    for _ in range(2):
        agrees(layer, x, direct)
        layer.weight_scale.mul_(2)  # another key, the same memory
    assert len(kept) == 1
    assert torch.equal(layer._buffers[CODES], codes)
    layer._buffers[CODES] = codes
    agrees(layer, x, direct)
    assert len(kept) == 2


def test_tensors_of_inference_mode_are_looked_at_each_time(direct):
    with torch.inference_mode():
        layer, x = layer_of("w8a16"), torch.randn(3, 21)
        layer(x)
        layer.weight_scale.mul_(2)
        layer.bias.add_(1)
        agrees(layer, x, direct)


@schemes
def test_any_number_of_threads(scheme, direct):
    layer, x, threads = layer_of(scheme), torch.randn(70, 21), torch.get_num_threads()
    want = layer(x)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(layer(x), want)
    finally:
        torch.set_num_threads(threads)


@schemes
def test_several_python_threads_at_once(scheme):
    layer = layer_of(scheme)
    xs = [torch.randn(n + 1, 21) for n in range(8)]
    want, wrong = [layer(x) for x in xs], []

    def work(x: torch.Tensor, expected: torch.Tensor) -> None:
        for _ in range(200):
            if not torch.equal(layer(x), expected):
                wrong.append(x)

    jobs = [threading.Thread(target=work, args=pair) for pair in zip(xs, want, strict=True)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not wrong


def test_direct_calls_are_counted(direct):
    layers = [layer_of(s) for s in ("w8a16", "nf4-g8", "w8a8", "w8a8-static")]
    with ops.count_calls() as calls:
        for layer in layers:
            layer(torch.randn(2, 21))
    names = ["linear", "linear_codebook", "linear_dynamic", "linear_static"]
    assert direct == names
    assert calls == {f"qkit::{name}[{native.isa()}]": 1 for name in names}
