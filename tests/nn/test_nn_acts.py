"""QLinear with quantized activations and codebooks: one layer, whoever runs it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qkit.algorithms import rtn
from qkit.nn import QConv2d, QLinear
from qkit.numerics import dequantize, qparams_from_range
from qkit.spec import Codebook, PerChannel, QSpec, Scheme, parse

MINE = Scheme(QSpec(Codebook("mine", (-1.0, -0.3, 0.1, 0.4, 1.2)), PerChannel(0)))
NAMES = [
    *("w8a16", "w8a8", "w8a8-static", "w4a8-g8", "w4a8-g8-static", "w8a8-asym"),
    *("nf4-g8", "fp8", "fp8-e5m2-g8", "mxfp4", "mxfp8"),
]
SCHEMES = {name: parse(name) for name in NAMES} | {"mine": MINE}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def layer_of(scheme: Scheme, dtype: torch.dtype = torch.float32) -> QLinear:
    layer, acts = nn.Linear(21, 5).to(dtype), scheme.input
    given = None
    if acts is not None and acts.when == "static":
        given = qparams_from_range(torch.tensor([[-2.0]]), torch.tensor([[2.5]]), acts)
    q = rtn(layer.weight.detach(), scheme.weight)
    return QLinear.from_float(layer, q, acts, given).eval()


class Net(nn.Module):
    """Two layers of one scheme."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.a, self.b = layer_of(scheme), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@schemes
def test_compile_without_graph_breaks(scheme):
    torch.compiler.reset()
    layer = layer_of(scheme)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 5):
        x = torch.randn(rows, 21)
        assert torch.equal(compiled(x), layer(x))


@schemes
def test_compiled_gradients(scheme):
    torch.compiler.reset()
    layer, x = layer_of(scheme), (2 * torch.randn(4, 21)).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    got = torch.autograd.grad(compiled(x).square().sum(), (x, layer.bias))
    torch.testing.assert_close(got, want)


@schemes
def test_export_with_a_dynamic_batch(scheme):
    layer = layer_of(scheme)
    batch = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(layer, (torch.randn(4, 21),), dynamic_shapes=batch)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 21)
        assert torch.equal(program.module()(x), layer(x))


@schemes
def test_the_stored_tensors_come_back(scheme):
    layer, other = layer_of(scheme), layer_of(scheme)
    state = copy.deepcopy(layer.state_dict())
    other.load_state_dict(state)
    x = torch.randn(3, 21)
    assert torch.equal(other(x), layer(x))
    static = scheme.input is not None and scheme.input.when == "static"
    assert ("input_scale" in state) == static
    assert ("weight_levels" in state) == isinstance(scheme.weight.format, Codebook)
    assert ("weight_scale" in state) == (not scheme.weight.is_cast)
    gone = "input_scale", "weight" if scheme.weight.is_cast else "weight_scale"
    lacking = {k: v for k, v in state.items() if k not in gone}
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict(lacking)


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_moving_to_a_dtype_keeps_what_is_stored(scheme, dtype):
    layer = layer_of(scheme)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer.to(dtype)
    assert layer(torch.randn(2, 21).to(dtype)).dtype == dtype
    assert layer.weight.dtype == dtype
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))  # NaN too


@schemes
def test_the_float_weight(scheme):
    layer = layer_of(scheme)
    assert torch.equal(layer.weight, dequantize(layer.qtensor()))


def test_what_has_no_layer_says_so():
    assert QLinear.lacks(MINE) is None
    assert QLinear.lacks(parse("w8a8-static")) is None
    assert "activations" in (QLinear.lacks(Scheme(MINE.weight, parse("w8a8").input)) or "")
    assert "activations" in (QConv2d.lacks(parse("w8a8")) or "")
    assert QConv2d.lacks(MINE) is None
    with pytest.raises(TypeError, match="activations"):
        QConv2d(nn.Conv2d(2, 2, 1), parse("w8a8").weight, parse("w8a8").input)


FRESH = """
import sys, torch
import qkit.ops
from torch._inductor import aoti_load_package
model, tensors = aoti_load_package(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
assert torch.equal(model(tensors["x"]), tensors["y"]), "other outputs"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch, by torch
@schemes
def test_an_aot_inductor_package_in_a_fresh_process(scheme, tmp_path: Path):
    net, x = Net(scheme).eval().requires_grad_(False), torch.randn(4, 21)
    program = torch.export.export(net, (x,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2")
    )
    torch.save({"x": x, "y": net(x)}, tmp_path / "tensors.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, package, str(tmp_path / "tensors.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
