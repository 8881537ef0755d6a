"""The operators as citizens of torch: opcheck, compile, export, and counting what ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkit import ops
from qkit.numerics import choose_qparams, quantize
from qkit.packing import to_tensors
from qkit.spec import PerGroup, parse

SCHEMES = ["w8a16", "w8a16-g8-asym", "w4a16-g8", "w3a16-channel-asym", "w4a16-tensor"]
NAMES = {"linear": "qkit::linear", "conv2d": "qkit::conv2d", "dequantize": "qkit::dequantize"}


def stored(scheme: str, *shape: int):
    spec = parse(scheme).weight
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).flatten(1)
    tensors = to_tensors(quantize(weight, choose_qparams(weight, spec), spec), shape)
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    key = "weight" if spec.format.bits == 8 else "weight_packed"
    return (tensors[key], tensors["weight_scale"], tensors.get("weight_zero_point")), (
        spec.format.bits,
        group,
    )


def linear_args(scheme: str, *, grad: bool = False, lead=(3,), dtype=torch.float32, bias=True):
    weight, how = stored(scheme, 5, 9)
    x = torch.randn(*lead, 9).to(dtype).requires_grad_(grad)
    return x, *weight, torch.randn(5).to(dtype).requires_grad_(grad) if bias else None, *how


def conv2d_args(scheme: str, *, grad: bool = False, groups: int = 1, channels_last: bool = False):
    weight, how = stored(scheme, 6, 4 // groups, 3, 3)
    x = torch.randn(2, 4, 7, 6)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    bias = torch.randn(6).requires_grad_(grad)
    return x.requires_grad_(grad), *weight, bias, *how, [3, 3], [2, 1], [1, 0], [1, 2], groups


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_linear(scheme):
    torch.library.opcheck(ops.linear, linear_args(scheme, grad=True))


@pytest.mark.parametrize(
    ("dtype", "lead"),
    [(torch.bfloat16, ()), (torch.float16, (0,)), (torch.float64, (2, 3))],
    ids=["bf16-vector", "fp16-empty", "fp64-batches"],
)
def test_opcheck_linear_of_other_inputs(dtype, lead):
    torch.library.opcheck(ops.linear, linear_args("w4a16-g8", dtype=dtype, lead=lead, bias=False))


@pytest.mark.parametrize(
    ("scheme", "groups", "channels_last"),
    [
        ("w8a16-g8-asym", 1, True),
        ("w4a16-g8", 1, False),
        ("w8a16", 2, False),
        ("w4a16-g8", 2, True),
    ],
    ids=["w8-channels-last", "w4-nchw", "w8-grouped", "w4-grouped-channels-last"],
)
def test_opcheck_conv2d(scheme, groups, channels_last):
    args = conv2d_args(scheme, grad=True, groups=groups, channels_last=channels_last)
    torch.library.opcheck(ops.conv2d, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_dequantize(scheme, dtype):
    weight, how = stored(scheme, 5, 9)
    torch.library.opcheck(ops.dequantize, (*weight, *how, 9, dtype))


class Small(nn.Module):
    """A convolution and a linear layer on its channels' means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_how = stored("w4a16-g8", 6, 3, 3, 3)
        self.fc, self.fc_how = stored("w8a16-asym", 5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = [1, 1]
        x = ops.conv2d(x, *self.conv, None, *self.conv_how, [3, 3], one, one, one, 1)
        return ops.linear(x.relu().mean((2, 3)), *self.fc, None, *self.fc_how)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    torch.compiler.reset()
    model = Small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_gradients():
    torch.compiler.reset()
    model, x = Small(), torch.randn(2, 3, 8, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_export_with_a_dynamic_batch():
    model = Small()
    program = torch.export.export(
        model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"qkit.conv2d.default", "qkit.linear.default"} <= targets
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def test_wrong_features_are_refused_while_tracing():
    x, *rest = linear_args("w8a16")
    traced = torch.compile(lambda x: ops.linear(x, *rest), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="8 features, the weight has 9"):
        traced(x[:, :8])


# ---------------------------------------------------------------- count_calls


def call(op: str) -> None:
    if op == "linear":
        ops.linear(*linear_args("w8a16"))
    elif op == "conv2d":
        ops.conv2d(*conv2d_args("w8a16"))
    else:
        weight, how = stored("w8a16", 5, 9)
        ops.dequantize(*weight, *how, 9, torch.float32)


def count(calls) -> dict[str, int]:
    """Calls by operator, whatever implementation ran."""
    total: dict[str, int] = {}
    for name, n in calls.items():
        total[name.partition("[")[0]] = total.get(name.partition("[")[0], 0) + n
    return total


@pytest.mark.parametrize("op", NAMES)
def test_calls_are_counted(op):
    with ops.count_calls() as calls:
        call(op)
        call(op)
    call(op)
    assert count(calls) == {NAMES[op]: 2}
    assert all(name.endswith("]") for name in calls), "the implementation is named"


def test_nested_counters_each_count_their_own_block():
    with ops.count_calls() as outer:
        call("linear")
        with ops.count_calls() as inner:
            call("conv2d")
        call("linear")
    assert count(inner) == {"qkit::conv2d": 1}
    assert count(outer) == {"qkit::linear": 2, "qkit::conv2d": 1}


def test_nested_counters_with_equal_counts_are_not_confused():
    with ops.count_calls() as outer:
        with ops.count_calls() as inner:
            call("linear")
        call("linear")
    assert count(inner) == {"qkit::linear": 1}
    assert count(outer) == {"qkit::linear": 2}


def test_counting_stops_after_an_exception():
    x, *rest = linear_args("w8a16")
    with pytest.raises(RuntimeError, match="must be a float"), ops.count_calls() as calls:
        ops.linear(x.int(), *rest)
    before = dict(calls)
    call("linear")
    assert dict(calls) == before


def test_tracing_is_not_counted_but_running_is():
    torch.compiler.reset()
    compiled = torch.compile(Small(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    compiled(x)
    with ops.count_calls() as calls, torch.no_grad():
        compiled(x)
    assert calls["qkit::linear[reference]"] <= 1
    assert count(calls) == {"qkit::conv2d": 1, "qkit::linear": 1}
