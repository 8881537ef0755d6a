"""From a model to an artifact of ExecuTorch, proved by it; and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import qkit as command
from torch import Tensor, nn

from qkit import errors
from qkit.flows import lower, verify
from qkit.flows.data import Data
from qkit.flows.demo import accuracy, load_digits, train
from qkit.flows.lower_file import parse_bounds
from qkit.report import package_version
from qkit.targets.xnnpack import BACKEND


class ResNet(nn.Module):
    """A small residual network for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 17, 3, padding=1)
        self.conv = nn.Conv2d(17, 17, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(17)
        self.head = nn.Linear(17, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = nn.functional.max_pool2d((x + self.norm(self.conv(x))).relu(), 2)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_static_residual_network_on_real_digits(tmp_path):
    digits, model, out = load_digits(), ResNet(), tmp_path / "out"
    train(model, digits, epochs=4)
    report = lower(model, "int8-static", out, target="xnnpack", calib=digits.train_x[:256])
    assert report.verification["fresh_process"]
    assert report.verification["checks"][0]["way"] == "model.pte"
    assert report.kernels["Conv2d qs8"] + report.kernels.get("DepthwiseConv2d qs8", 0) == 2
    assert report.kernels["FullyConnected qs8"] == 1
    assert report.kernels["Add qs8"] == 1
    assert not any(
        "not delegated" in remark or "left between" in remark for remark in report.remarks
    )
    assert any("batch 1 to 64" in remark for remark in report.remarks)
    assert report.coverage["layers_quantized"] == 3
    assert report.latency_ms["runtime"].startswith("executorch")
    assert {"float", "quantized"} <= report.latency_ms.keys()
    session, outputs = BACKEND.load(out / "model.pte", 1), []
    for batch in digits.test_x.split(64):
        outputs.append(session((batch,), {})[0])
    right = 100 * float((torch.cat(outputs).argmax(1) == digits.test_y).float().mean())
    assert abs(right - accuracy(model, digits)) <= 0.5
    for n in (1, 3, 33):
        assert session((digits.test_x[:n],), {})[0].shape == (n, 10)
    with pytest.raises(errors.InputError, match="fails on the inputs"):
        session((digits.test_x[:65],), {})
    assert verify(out)["status"] == "verified"


class Transformer(nn.Module):
    """One block, with attention written out and a free length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(24, 33), nn.Linear(33, 24), nn.Linear(24, 7)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (each(self.norm(x)) for each in self.qkv)
        x = x + torch.softmax(q @ k.transpose(1, 2) * scale[:, None], -1) @ v
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def test_dynamic_transformer_with_named_inputs_and_a_free_length(tmp_path, same_process):
    model, ids = Transformer().eval(), torch.randint(0, 31, (5, 9))
    report = lower(
        model,
        "int8-dynamic",
        tmp_path / "out",
        target="xnnpack",
        calib={"ids": ids, "scale": torch.rand(5, 1)},
        dims={"ids": {1: "length"}},
        options={"bounds": {"length": 40}},
    )
    assert report.kernels == {"FullyConnected qd8": 6}
    assert report.error["sqnr_db"] > 30
    told = " ".join(report.remarks)
    assert "aten::native_layer_norm" in told
    assert "batch 1 to 64, length 1 to 40" in told
    assert "in this order: ids, scale" in told
    assert "aten::embedding x2" in told  # of codes, and of their scales
    rows = {row.name: row for row in report.layers}
    assert rows["embed"].scheme == "w8a16"
    assert json.loads((tmp_path / "out/qkit.json").read_text())["options"] == {
        "bounds": {"length": 40}
    }
    session = BACKEND.load(tmp_path / "out" / "model.pte", 1)
    given = {"scale": torch.rand(3, 1), "ids": torch.randint(0, 31, (3, 33))}
    assert session((), given)[0].shape == model(**given).shape


def test_only_quantizing_and_the_reason_of_a_dynamic_convolution(tmp_path):
    report = lower(
        ResNet().eval(), "int8-dynamic", None, target="xnnpack", calib=torch.randn(9, 1, 8, 8)
    )
    reasons = {row.name: row.reason for row in report.layers}
    assert "use int8-static" in reasons["stem"]
    assert reasons["head"] is None
    assert report.verification["status"] == "not run"


def test_a_model_of_dynamic_convolutions_alone_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 3, 3)).eval()
    with pytest.raises(errors.CoverageError, match="use int8-static"):
        lower(model, "int8-dynamic", None, target="xnnpack", calib=torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w4a8-static", "nf4", "fp16"])
def test_schemes_that_xnnpack_lacks(mlp, scheme):
    with pytest.raises(errors.RequestError, match="no kernels for this scheme") as caught:
        lower(mlp, scheme, None, target="xnnpack", calib=torch.randn(2, 33))
    assert caught.value.exit_code == 7
    assert "int8-static or int8-dynamic" in str(caught.value)


def test_one_scale_for_all_weights_with_dynamic_ranges(mlp):
    with pytest.raises(errors.RequestError, match="static ranges only"):
        lower(mlp, "w8a8-tensor", None, target="xnnpack", calib=torch.randn(2, 33))


@pytest.mark.parametrize("missing", ["executorch", "torchao"])
def test_missing_packages_are_told_before_the_data_are_read(mlp, monkeypatch, missing):
    def explode():
        raise AssertionError("the data were read")

    monkeypatch.setattr(
        "qkit.report.package_version",
        lambda name: None if name == missing else package_version(name),
    )
    with pytest.raises(errors.MissingExtraError, match=missing) as caught:
        lower(mlp, "int8-static", None, target="xnnpack", calib=Data("never", explode))
    assert caught.value.exit_code == 7
    assert "pip install 'qkit-torch[xnnpack]'" in str(caught.value)


def test_bounds_on_the_command_line():
    assert parse_bounds(["batch=8", "length=128"]) == {"batch": 8, "length": 128}
    for wrong in ("batch", "batch=", "1=8", "batch=-1", "batch=1.5"):
        with pytest.raises(errors.UsageError, match="bound of a dimension"):
            parse_bounds([wrong])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp: nn.Module) -> Path:
    torch.save(mlp, tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(17, 33)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_the_command_writes_verifies_and_refuses(folder, scheme):
    made = command(
        *("quantize", "net.pt", "--scheme", scheme, "--target", "xnnpack"),
        *("--calib", "data.npz", "--bound", "batch=5", "-o", "out", "--json"),
        cwd=folder,
    )
    assert made.code == 0, made.err
    assert made.json["target"] == "xnnpack"
    kernel = {"int8-static": "FullyConnected qs8", "int8-dynamic": "FullyConnected qd8"}[scheme]
    assert made.json["kernels"] == {kernel: 2}
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"model.pte", "qkit.json", "report.json", "check.safetensors"}
    file = folder / "out/model.pte"
    told = command("verify", file, cwd=folder)
    assert told.code == 0, told.err
    assert f"{kernel} x2" in told.out
    assert command("verify", file, "--dialect", "tensorrt", cwd=folder).code == 2
    file.write_bytes(file.read_bytes()[:500])
    assert command("verify", "out", cwd=folder).code == 3
    assert command("verify", file, cwd=folder).code == 3
