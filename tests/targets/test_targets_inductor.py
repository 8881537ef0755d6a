"""Inductor: the graph it is given, the package, and what is in it."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_models import Block
from torch import Tensor, nn

from qkit import errors
from qkit.flows.pt2e import convert
from qkit.graph import capture, quiet
from qkit.spec import parse
from qkit.targets.backend import Converted
from qkit.targets.inductor import BACKEND
from qkit.targets.inductor.runtime import audit
from qkit.targets.inductor.write import program_of, require_compiler

# Products in fp32, summed in another order.
FP32 = 2.0**-20


@pytest.fixture(scope="module")
def linear() -> Converted:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 31, bias=False), nn.ReLU(), nn.Linear(31, 7)).eval()
    done = convert(model, "int8-static", torch.randn(9, 33), dialect="inductor")
    return replace(done, module=BACKEND.specialize(done))


def test_the_same_program_gives_the_same_bytes_which_name_no_folder(linear, tmp_path):
    contents = []
    for number in range(2):
        path = tmp_path / f"{number}.pt2"
        BACKEND.export(linear, path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    with zipfile.ZipFile(path) as archive:
        told = [*archive.namelist(), *map(archive.read, archive.namelist())]
    for word in ("site-packages", "/tmp", "qkit-", str(Path.cwd())):
        assert not any(word.encode() in (t.encode() if isinstance(t, str) else t) for t in told)
    found = audit(path, 2)
    assert (found.ran, found.integer, found.floating) == (2, {"qlinear_pointwise_tensor": 2}, {})


def test_a_program_without_integer_kernels_is_refused(linear, tmp_path):
    path = tmp_path / "float.pt2"
    BACKEND.export_float(linear.captured, path)
    found = audit(path, 2)
    assert found.ran == 0
    assert sum(found.floating.values()) == 2
    with pytest.raises(errors.CoverageError, match="no integer kernel") as caught:
        found.require("float.pt2")
    assert caught.value.exit_code == 5


ONE_CALL = """
import sys, torch
from pathlib import Path
from qkit.targets.inductor import BACKEND
session = BACKEND.load(Path(sys.argv[1]), 2)
for batch in (1, 4, 7):
    session((torch.randn(batch, 128, 28, 28),), {})
"""


def test_no_weight_is_laid_out_anew_at_each_call(tmp_path):
    """Without the sizes of the example oneDNN laid these 512 rows out in an order that its kernel
    does not take, and each call began with 9 ms of bringing them into another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 512, 1), nn.ReLU()).eval()
    done = convert(model, "int8-static", torch.randn(4, 128, 28, 28), dialect="inductor")
    path = tmp_path / "model.pt2"
    BACKEND.export(replace(done, module=BACKEND.specialize(done)), path)
    told = subprocess.run(
        [sys.executable, "-c", ONE_CALL, path],
        env=os.environ | {"ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    ran = [line.split(",") for line in told.stdout.splitlines() if ",exec," in line]
    assert [line for line in ran if "convolution" in line], "oneDNN tells what it runs"
    assert not [line for line in ran if "reorder" in line and "512x128x1x1" in line]


def test_settings_are_what_they_were_after_an_error(linear, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 13" || exit 3\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    with quiet():  # it warns of what it imports
        from torch._inductor import freezing
    config, passes = torch._inductor.config, freezing.freezing_passes
    with config.patch({"cpp.cxx": str(compiler), "freezing": False}):
        before = config.save_config_portable()
        with pytest.raises(errors.RequestError, match="CppCompileError") as caught:
            BACKEND.export(linear, tmp_path / "m.pt2")
        assert config.save_config_portable() == before
    assert freezing.freezing_passes is passes
    assert caught.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_no_compiler():
    with (
        torch._inductor.config.patch({"cpp.cxx": "no-such-compiler"}),
        pytest.raises(errors.RequestError, match=r"needs a C\+\+ compiler") as caught,
    ):
        require_compiler()
    assert caught.value.exit_code == 7


def test_other_processors_schemes_and_options_are_refused(monkeypatch):
    with pytest.raises(errors.RequestError, match="scale per channel"):
        BACKEND.check(parse("w8a8-tensor"), {})
    for options in ({"dialect": "tensorrt"}, {"accuracy_level": 4}, {"bounds": {"batch": 3}}):
        with pytest.raises(errors.UsageError, match="is for --target"):
            BACKEND.check(None, options)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(errors.RequestError, match="x86"):
        BACKEND.check(None, {})


def quantized(node: torch.fx.Node, name: str = "quantize_per_tensor") -> bool:
    return f".{name}." in str(node.target)


@pytest.mark.parametrize("last", ["shortcut", "layer"])
def test_one_term_of_a_sum_is_left_to_the_kernel_of_the_other(last):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 5, 1), Block(5)
            self.side = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x))
            y = (self.side(x) + x) if last == "shortcut" else (x + self.side(x))
            return self.stem.weight.sum() + y.relu()

    done = convert(Net().eval(), "int8-static", torch.randn(4, 3, 9, 9), dialect="inductor")
    sums = [node for node in done.module.graph.nodes if node.name.startswith("add")][:2]
    for node in sums:
        # One term comes from the layer as it is, the other one as codes; the ReLU is rounded.
        codes = [quantized(term, "dequantize_per_tensor") for term in node.all_input_nodes]
        assert sorted(codes) == [False, True]
        (relu,) = node.users
        assert "relu" in relu.name
    assert all(quantized(user) for user in next(iter(sums[0].users)).users)


@pytest.mark.parametrize("groups", [1, 3])
def test_one_channel_becomes_two_and_sums_stay(groups):
    model = nn.Sequential(nn.Conv2d(groups, 6, 3, padding=1, groups=groups), nn.ReLU()).eval()
    x = torch.randn(4, groups, 9, 9)
    done = convert(model, "int8-static", x, dialect="inductor")
    before = done.module(x)
    after = BACKEND.specialize(done)
    assert (after(x) - before).abs().max() <= FP32 * before.max()
    weights = {t.shape[1] for t in after.state_dict().values() if t.dtype == torch.int8}
    assert weights == ({1, 2} if groups == 1 else {1})


def test_a_convolution_of_one_dimension_is_left_in_float():
    model = nn.Sequential(nn.Conv1d(5, 6, 3), nn.Flatten(), nn.Linear(42, 3)).eval()
    done = convert(model, "int8-static", torch.randn(4, 5, 9), dialect="inductor")
    reasons = {site.owner: site.reason for site in done.sites}
    assert reasons == {"0": "inductor has no integer Conv1d", "2": None}


class Named(nn.Module):
    def forward(self, z: Tensor, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"sum": z - 2 * b + 4 * a}


def test_programs_take_inputs_by_place_and_by_name():
    z, b, a = torch.randn(3, 5, 7).unbind()
    captured = capture(Named(), (z,), {"a": a, "b": b}, dims={n: {1: "n"} for n in "zba"})
    program = program_of(captured.module(), captured)
    z, b, a = torch.randn(3, 2, 3).unbind()
    assert torch.equal(program.module()(z, b=b, a=a)["sum"], z - 2 * b + 4 * a)


class Transposed(nn.Module):
    """Two layers on rows that do not lie one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(1, 2) * 2
        return self.a(x), self.b(x)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_rows_that_lie_apart_are_copied_once(scheme):
    x = torch.randn(4, 5, 7)
    done = convert(Transposed().eval(), scheme, x, dialect="inductor")
    before = done.module(x)
    after = BACKEND.specialize(done)
    copies = [n for n in after.graph.nodes if n.target is torch.ops.aten.contiguous.default]
    assert len(copies) == 1
    # Who chooses the range sees them too, so that nothing else reads the rows that lie apart.
    assert list(copies[0].all_input_nodes[0].users) == copies
    for got, want in zip(after(x), before, strict=True):
        assert (got - want).abs().max() <= FP32 * want.abs().max()
