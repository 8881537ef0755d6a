"""From a model to an AOTInductor package, proved by torch in a fresh process; what is refused.

A compilation takes some ten seconds, so that each artifact here serves several tests.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import files
from command import qkit as command
from graph_models import ResNet
from torch import Tensor, nn

import qkit
from qkit import errors
from qkit.flows import lower, verify
from qkit.flows.data import Data
from qkit.flows.demo import Digits, accuracy, load_digits, train
from qkit.report import Report, package_version
from qkit.targets.inductor import BACKEND
from qkit.targets.inductor.runtime import Package


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@dataclass(frozen=True)
class Made:
    """A model, its artifact, and the report of its making."""

    model: nn.Module
    path: Path
    report: Report


@pytest.fixture(scope="module")
def static(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    model, path = ResNet(), tmp_path_factory.mktemp("static") / "out"
    train(model, digits, epochs=4)
    data = digits.train_x[:256]
    return Made(model, path, lower(model, "int8-static", path, target="inductor", calib=data))


def test_static_residual_network_on_real_digits(static, digits):
    report = static.report
    assert report.verification["fresh_process"]
    assert report.verification["checks"][0]["way"] == "model.pt2"
    # Two of five convolutions add the shortcut, all have the ReLU behind them, and nothing between
    # them is in float.
    assert report.kernels == {
        "qconv2d_pointwise_binary_tensor": 2,
        "qconv_pointwise_tensor": 3,
        "qlinear_pointwise_tensor": 1,
        "quantized::max_pool2d": 1,
    }
    assert report.coverage["layers_quantized"] == 6
    assert not any("run as integers; in float" in remark for remark in report.remarks)
    assert any("native code, compiled for" in remark for remark in report.remarks)
    assert report.latency_ms["runtime"].startswith("torch")
    assert {"float", "quantized", "eager"} <= report.latency_ms.keys()
    package = Package(static.path / "model.pt2")
    right = 100 * float((package(digits.test_x).argmax(1) == digits.test_y).float().mean())
    assert abs(right - accuracy(static.model, digits)) <= 0.5
    for n in (1, 3, 33):
        assert package(digits.test_x[:n]).shape == (n, 10)


def test_verification_runs_native_code_only_where_it_is_trusted(static):
    for path in (static.path, static.path / "model.pt2"):
        with pytest.raises(errors.UnsafeCodeError, match="native code") as caught:
            verify(path)
        assert caught.value.exit_code == 3
        assert "--trust-code" in str(caught.value)
    assert verify(static.path, trust_code=True)["status"] == "verified"


def test_the_command_verifies_packages_and_refuses_damaged_ones(static, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(static.path, out)
    file = out / "model.pt2"
    refused = command("verify", out)
    assert refused.code == 3
    assert "native code" in refused.error
    told = command("verify", file, "--trust-code")
    assert told.code == 0, told.err
    assert "qlinear_pointwise_tensor x1" in told.out
    assert command("verify", file, "--dialect", "tensorrt").code == 2
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as package:
        library = next(i for i in package.infolist() if i.filename.endswith(".so"))
    # Cut off; an entry of other bytes; no package; a package without its library.
    middle = library.header_offset + library.compress_size // 2
    for content in (
        whole[:500],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        b"",
        b"not a zip",
    ):
        file.write_bytes(content)
        with pytest.raises(errors.InputError, match="corrupt"):
            verify(file, trust_code=True)
        with pytest.raises(errors.InputError, match="not the one that was written"):
            verify(out, trust_code=True)
    with zipfile.ZipFile(static.path / "model.pt2") as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if not name.endswith(".so"):
                new.writestr(name, old.read(name))
    with pytest.raises(errors.InputError, match="not an AOTInductor package"):
        verify(file, trust_code=True)
    assert command("verify", file, "--trust-code").code == 3


def test_a_library_that_is_none_is_told(static, tmp_path):
    file = tmp_path / "model.pt2"
    with zipfile.ZipFile(static.path / "model.pt2") as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x7fELF" if name.endswith(".so") else old.read(name))
    with pytest.raises(errors.InputError, match=r"refuses|ends the process"):
        verify(file, trust_code=True)


def test_a_program_of_torch_export_is_no_package(mlp, tmp_path):
    torch.export.save(torch.export.export(mlp, (torch.randn(2, 33),)), tmp_path / "m.pt2")
    with pytest.raises(errors.InputError, match=r"a torch\.export program"):
        verify(tmp_path / "m.pt2")


def test_a_package_refuses_inputs_that_its_code_would_misread(static):
    package = Package(static.path / "model.pt2")
    assert package.inputs == {"args": [["float32", [None, 1, 8, 8]]], "kwargs": {}}
    x = torch.randn(2, 1, 8, 8)
    for wrong in ((x[:, :, :7],), (x[0],), (x.double(),), (), (x, x)):
        with pytest.raises(errors.UsageError, match="input"):
            package(*wrong)
    with pytest.raises(errors.UsageError, match="other inputs"):
        package(x=x)
    with pytest.raises(errors.InputError, match="fails on the inputs"):
        BACKEND.load(static.path / "model.pt2", torch.get_num_threads())((x[0],), {})


class Reader(nn.Module):
    """An LSTM over numbered words, and a head; with outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.lstm = nn.LSTM(12, 17, batch_first=True)
        self.up = nn.Linear(17, 33, bias=False)
        self.head = nn.Linear(33, 7)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor | tuple[Tensor]]:
        x, _ = self.lstm(self.embed(ids))
        hidden = self.up(x * scale[:, None]).relu()
        return {"scores": self.head(hidden), "hidden": (hidden,)}


def test_compiled_in_this_process_with_names_and_the_honest_row_of_an_lstm():
    before = torch._inductor.config.freezing, torch._inductor.config.size_asserts
    model, ids = Reader().eval(), torch.randint(0, 31, (6, 3))
    net, report = qkit.compiled(
        model,
        "int8-dynamic",
        calib={"ids": ids, "scale": torch.rand(6, 1) + 0.5},
    )
    assert (torch._inductor.config.freezing, torch._inductor.config.size_asserts) == before
    assert report.artifact is None
    assert report.error["sqnr_db"] > 30
    assert report.kernels == {"qlinear_pointwise_tensor": 2}
    rows = {row.name: row for row in report.layers}
    assert (rows["up"].scheme, rows["head"].scheme) == ("w8a8", "w8a8")
    assert rows["embed"].scheme == "w8a16"
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert rows[name].scheme is None
        assert rows[name].reason == "inductor has no integer LSTM"
    given = {"scale": torch.rand(3, 1) + 0.5, "ids": torch.randint(0, 31, (3, 3))}
    outputs, exact = net(**given), model(**given)
    assert outputs["scores"].shape == exact["scores"].shape
    error = (outputs["hidden"][0] - exact["hidden"][0]).norm() / exact["hidden"][0].norm()
    assert error < 10 ** (-30 / 20)
    assert not outputs["scores"].requires_grad


@pytest.fixture
def saved(tmp_path: Path, mlp: nn.Module) -> Path:
    torch.save(mlp, tmp_path / "net.pt")
    return tmp_path


QUANTIZE = ("quantize", "net.pt", "--target", "inductor", "--scheme", "int8-dynamic")


def test_the_command_writes_a_dynamic_mlp(saved):
    made = command(*QUANTIZE, "--input", "5x33", "-o", "out", "--json", cwd=saved)
    assert made.code == 0, made.err
    assert made.json["kernels"] == {"qlinear_pointwise_tensor": 2}
    assert set(files(saved / "out")) == {
        *("model.pt2", "qkit.json", "report.json", "check.safetensors")
    }
    assert json.loads((saved / "out/qkit.json").read_text())["target"] == "inductor"


def test_no_compiler_is_told_before_anything_is_loaded(saved):
    (saved / "net.pt").write_bytes(b"not a model")  # which would be told otherwise
    for env in ({"PATH": str(saved)}, {"CXX": "no-such-compiler"}):
        done = command(*QUANTIZE, "--input", "5x33", cwd=saved, env=env)
        assert done.code == 7
        assert "C++ compiler" in done.error
    assert not list(saved.glob("net-*"))


def explode() -> None:
    raise AssertionError("the data were read")


def test_a_missing_package_is_told_before_the_data_are_read(mlp, monkeypatch):
    monkeypatch.setattr(
        "qkit.report.package_version",
        lambda name: None if name == "torchao" else package_version(name),
    )
    with pytest.raises(errors.MissingExtraError, match="torchao") as caught:
        lower(mlp, "int8-static", None, target="inductor", calib=Data("never", explode))
    assert caught.value.exit_code == 7
    assert "pip install 'qkit-torch[pt2e]'" in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        *((name, "no kernels for this scheme") for name in ("w8a16", "w4a16-g32", "nf4", "fp16")),
        ("w8a8-tensor", "a scale per channel only"),
    ],
)
def test_schemes_that_inductor_lacks(mlp, scheme, message):
    with pytest.raises(errors.RequestError, match=message) as caught:
        lower(mlp, scheme, None, target="inductor", calib=Data("never", explode))
    assert caught.value.exit_code == 7
    assert "int8-static or int8-dynamic" in str(caught.value)


class Positive(nn.Module):
    """The mean of a relu before a linear layer: a range far from zero, which must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)) + 1)


def test_dynamic_ranges_contain_zero(tmp_path, same_process):
    """Inductor's own form of the operator does not see to that: pytorch/ao issue 4292."""
    x = torch.randn(4, 3, 9, 9)
    report = lower(Positive().eval(), "int8-dynamic", tmp_path / "out", target="inductor", calib=x)
    assert report.coverage["integer_layers"] == 1
    assert report.verification["max_rel_error"] < 1e-5


def test_dynamic_convolutions_are_left_with_the_alternative():
    x = torch.randn(4, 1, 8, 8)
    report = lower(ResNet().eval(), "int8-dynamic", None, target="inductor", calib=x)
    reasons = {row.name: row.reason for row in report.layers}
    assert "use int8-static" in reasons["stem"]
    assert reasons["head"] is None
    convolution = nn.Sequential(nn.Conv2d(1, 3, 3)).eval()
    with pytest.raises(errors.CoverageError, match="use int8-static"):
        lower(convolution, "int8-dynamic", None, target="inductor", calib=x)
