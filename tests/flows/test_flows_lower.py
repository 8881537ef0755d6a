"""From a model to an artifact of ONNX Runtime, proved by it; and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command import qkit as command
from graph_models import Encoder, ResNet
from safetensors.torch import load_file
from torch import Tensor, nn

from qkit import errors
from qkit.flows import inspect, lower, lower_file, verify
from qkit.flows.data import Data
from qkit.flows.demo import Digits, accuracy, load_digits, train
from qkit.flows.lower_file import parse_dims
from qkit.flows.qat import Qat
from qkit.flows.quantize import Request
from qkit.flows.runtime import judge
from qkit.flows.train import labelled
from qkit.report import Report, package_version
from qkit.spec import Recipe, Rule, parse
from qkit.targets.artifact import CHECK
from qkit.targets.onnx import BACKEND


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def resnet(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet()
    train(model, digits, epochs=4)
    return model


def session_accuracy(path: Path, data: Digits) -> float:
    outputs = BACKEND.load(path / "model.onnx", 1)((data.test_x,), {})
    return 100 * float((outputs[0].argmax(1) == data.test_y).float().mean())


def test_static_residual_network_on_real_digits(resnet, digits, tmp_path):
    out = tmp_path / "out"
    report = lower(resnet, "int8-static", out, calib=digits.train_x[:256])
    # In a fresh process, by ONNX Runtime; every layer and sum an integer kernel.
    assert report.verification["fresh_process"]
    assert report.kernels["QLinearConv"] == 5
    assert report.kernels["QGemm"] == 1
    assert report.kernels["QLinearAdd"] == 2
    assert not any("left between kernels" in remark for remark in report.remarks)
    weights = [t for t in onnx.load(out / "model.onnx").graph.initializer if len(t.dims) > 1]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    assert report.size_bytes["artifact"] < report.size_bytes["float"] / 2  # the graph counts here
    assert report.coverage["layers_quantized"] == 6
    assert {row.name for row in report.layers if row.scheme} >= {"stem", "body.0.conv1", "head"}
    assert abs(session_accuracy(out, digits) - accuracy(resnet, digits)) <= 0.5
    stored = Report.from_json(json.loads((out / "report.json").read_text()))
    assert stored.kernels == report.kernels
    assert stored.latency_ms["runtime"].startswith("onnxruntime")
    # Any batch, though the example had 8.
    session = BACKEND.load(out / "model.onnx", 1)
    for n in (1, 3, 33):
        assert session((digits.test_x[:n],), {})[0].shape == (n, 10)
    assert verify(out)["status"] == "verified"


def test_dynamic_transformer_with_a_free_length(tmp_path, same_process):
    model, ids = Encoder().eval(), torch.randint(0, 31, (5, 9))
    report = lower(
        model,
        "int8-dynamic",
        tmp_path / "out",
        calib={"ids": ids},
        dims={"ids": {1: "length"}},
    )
    assert report.kernels == {"DynamicQuantizeMatMul": 9}
    # Attention has rows of its own, for the layers that it is opened into.
    rows = {row.name: row for row in report.layers}
    for name in ("in_proj_weight", "out_proj"):
        assert rows[f"body.layers.1.self_attn.{name}"].scheme == "w8a8"
    assert rows["embed"].scheme == "w8a16"
    assert report.coverage["layers_quantized"] == 10
    assert report.coverage["integer_layers_expected"] == 9
    assert report.error["sqnr_db"] > 30
    session = BACKEND.load(tmp_path / "out" / "model.onnx", 1)
    ids = torch.randint(0, 31, (3, 33))
    assert session((), {"ids": ids})[0].shape == model(ids).shape


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-g32"])
def test_weights_alone(mlp, tmp_path, same_process, scheme, level):
    x = torch.randn(9, 33)
    options = {"accuracy_level": level}
    report = lower(mlp, scheme, tmp_path / "out", calib=x, options=options)
    assert report.kernels == {"MatMulNBits": 2}
    assert {row.algorithm for row in report.layers} == {"gptq" if "w4" in scheme else "rtn"}
    assert json.loads((tmp_path / "out/qkit.json").read_text())["options"] == options
    assert verify(tmp_path / "out")["status"] == "verified"


def test_weights_alone_by_gptq(mlp, tmp_path, same_process):
    x = torch.randn(64, 33)
    report = lower(mlp, "w4a16-g32", tmp_path / "out", calib=x, algorithm="gptq")
    assert {row.algorithm for row in report.layers} == {"gptq"}


def test_tensorrt_dialect(resnet, digits, tmp_path, same_process):
    options = {"dialect": "tensorrt"}
    out = tmp_path / "out"
    report = lower(resnet, "int8-static", out, calib=digits.train_x[:64], options=options)
    assert any("meets TensorRT's rules" in remark for remark in report.remarks)
    rules = verify(out / "model.onnx", dialect="tensorrt")["rules"]
    assert not any(rules.values())


def test_an_lstm_has_a_row_for_each_of_its_matrices():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(7, 5, batch_first=True)
            self.weights = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.lstm(x)[0], self.weights)

    x = torch.randn(4, 6, 7)
    for target, scheme in (("onnx", "w8a8"), ("xnnpack", None)):
        report = lower(Tagger().eval(), "int8-dynamic", None, target=target, calib=x)
        rows = {row.name: row for row in report.layers}
        for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
            assert rows[name].scheme == scheme
            assert scheme or "no integer LSTM" in rows[name].reason
        assert (rows[""].scheme, rows[""].note) == ("w8a8", "its Linear")
        assert rows[""].sqnr_db > 40


def test_mixed_layers_and_rows_that_say_why(resnet, digits, same_process, tmp_path):
    recipe = Recipe(
        (
            Rule("head", parse("int8-dynamic")),
            Rule("body.0", None),
            Rule("*", parse("int8-static")),
        )
    )
    report = lower(resnet, recipe, tmp_path / "out", calib=digits.train_x[:32])
    schemes = {row.name: row.scheme for row in report.layers}
    assert schemes["head"] == "w8a8"
    assert schemes["stem"] == schemes["body.2.conv1"] == "w8a8-static"
    assert schemes["body.0.conv1"] is None
    reasons = {row.name: row.reason for row in report.layers}
    assert "'body.0'" in reasons["body.0.conv1"]
    assert "folded" in reasons["body.2.norm1"]
    assert report.kernels["QLinearConv"] == 3
    assert report.kernels["DynamicQuantizeMatMul"] == 1


class FourAtATime(nn.Sequential):
    """Takes no other batch than four."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(4, 7)


@pytest.mark.parametrize("fixed", [False, True])
def test_inputs_too_large_for_the_check_file(fixed, tmp_path, same_process, monkeypatch):
    monkeypatch.setattr("qkit.flows.check.MAX_CHECK_VALUES", 100)
    layers = nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7)
    model = (FourAtATime if fixed else nn.Sequential)(*layers).eval()
    x = torch.randn(4 if fixed else 20, 33)
    report = lower(model, "int8-static", tmp_path / "out", calib=x)
    kept = load_file(tmp_path / "out" / CHECK)
    # A program of one batch keeps all of it; another, the first samples.
    assert len(kept["input.args.0"]) == (4 if fixed else 3)
    assert len(kept["module.0"]) == len(kept["float.0"]) == len(kept["input.args.0"])
    assert report.verification["status"] == verify(tmp_path / "out")["status"] == "verified"


def test_only_quantizing_writes_nothing(mlp, tmp_path):
    report = lower(mlp, "int8-static", None, calib=torch.randn(9, 33))
    assert report.verification["status"] == "not run"
    assert report.error["sqnr_db"] > 25


def test_a_drift_beyond_quantization_is_an_error():
    exact = torch.randn(64)
    wanted = exact + 0.01 * torch.randn(64)
    assert judge("m", BACKEND, [wanted], [exact], [wanted.clone()])["bit_identical"]
    near = wanted + 0.005 * torch.randn(64)
    assert judge("m", BACKEND, [wanted], [exact], [near])["checks"][0]["drift"] < 1
    for far in (wanted + 0.03 * torch.randn(64), wanted * torch.nan, wanted[:3], wanted.double()):
        with pytest.raises(errors.VerificationError):
            judge("m", BACKEND, [wanted], [exact], [far])


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w8a16", "no kernels for this scheme"),
        ("w4a16-g8", "no kernels for this scheme"),
        ("w4a8-static", "no kernels for this scheme"),
        ("nf4", "no kernels for this scheme"),
        ("fp16", "no kernels for this scheme"),
    ],
)
def test_schemes_that_onnx_lacks(mlp, scheme, message):
    with pytest.raises(errors.RequestError, match=message) as caught:
        lower(mlp, scheme, None, calib=torch.randn(2, 33))
    assert caught.value.exit_code == 7


def test_activations_and_weights_alone_do_not_mix(mlp):
    recipe = Recipe((Rule("0", parse("w4a16-g32")), Rule("*", parse("int8-static"))))
    with pytest.raises(errors.RequestError, match="not both"):
        lower(mlp, recipe, None, calib=torch.randn(2, 33))


def test_dynamic_convolutions_are_left_with_the_alternative(resnet, digits):
    report = lower(resnet, "int8-dynamic", None, calib=digits.train_x[:8])
    reasons = {row.name: row.reason for row in report.layers}
    assert "use int8-static" in reasons["stem"]
    assert reasons["head"] is None


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime", "torchao"])
def test_missing_packages_are_told_before_the_data_are_read(mlp, monkeypatch, missing):
    def explode():
        raise AssertionError("the data were read")

    monkeypatch.setattr(
        "qkit.report.package_version",
        lambda name: None if name == missing else package_version(name),
    )
    with pytest.raises(errors.MissingExtraError, match=missing) as caught:
        lower(mlp, "int8-static", None, calib=Data("never", explode))
    assert caught.value.exit_code == 7
    assert "pip install 'qkit-torch[onnx]'" in str(caught.value)


def test_models_of_other_types_are_refused(mlp):
    with pytest.raises(errors.RequestError, match="fp32 models"):
        lower(mlp.half(), "int8-static", None, calib=torch.randn(2, 33))


def test_unknown_options(mlp):
    x = torch.randn(2, 33)
    for options in ({"dialect": "tvm"}, {"accuracy_level": 5}):
        with pytest.raises(errors.UsageError, match="unknown"):
            lower(mlp, "int8-static", None, calib=x, options=options)
    with pytest.raises(errors.UsageError, match="PT2E"):
        lower(mlp, "int8-static", None, calib=x, target="torch")
    with pytest.raises(errors.UsageError, match="training finds"):
        lower(
            mlp,
            "int8-qat",
            None,
            calib=x,
            algorithm="gptq",
            qat=Qat(labelled(x, torch.zeros(2, dtype=torch.int64))),
        )


def test_dimensions_on_the_command_line():
    assert parse_dims(["a.1=n", "a.2=m", "b.0=n"]) == {"a": {1: "n", 2: "m"}, "b": {0: "n"}}
    for wrong in ("a", "a.1", "a.x=n", "a.1=2"):
        with pytest.raises(errors.UsageError, match="dynamic dimension"):
            parse_dims([wrong])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp) -> Path:
    torch.save(mlp, tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(17, 33)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_verifies_and_refuses(folder):
    made = command(
        *("quantize", "net.pt", "--scheme", "int8-static", "--target", "onnx"),
        *("--calib", "data.npz", "--json"),
        cwd=folder,
    )
    assert made.code == 0, made.err
    assert made.json["target"] == "onnx"
    assert made.json["kernels"] == {"QGemm": 2}
    out = folder / "net-w8a8-static-onnx"
    assert {p.name for p in out.iterdir()} == {
        *("model.onnx", "qkit.json", "report.json", "check.safetensors")
    }
    assert command("verify", out, cwd=folder).code == 0
    told = command("verify", out / "model.onnx", cwd=folder)
    assert told.code == 0
    assert "QGemm x2" in told.out
    broken = command("verify", out / "model.onnx", "--dialect", "tensorrt", cwd=folder)
    assert broken.code == 4
    assert "zero points are 0" in broken.error
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:500])
    assert command("verify", out, cwd=folder).code == 3
    assert command("verify", out / "model.onnx", cwd=folder).code == 3


def test_files_are_refused_before_any_work(folder, mlp):
    request = Request("net.pt", scheme="int8-static", target="onnx")
    with pytest.raises(errors.UsageError, match="learnt from data"):
        lower_file(request)
    torch.save(mlp.state_dict(), "state.pt")
    with pytest.raises(errors.UsageError, match="bare state dict"):
        lower_file(Request("state.pt", scheme="int8-static", target="onnx", calib="data.npz"))
    Path("net-w8a8-static-onnx").mkdir()
    Path("net-w8a8-static-onnx/mine").touch()
    with pytest.raises(errors.UsageError, match="left alone"):
        lower_file(Request("net.pt", scheme="int8-static", target="onnx", calib="data.npz"))


def test_a_run_without_output(folder):
    request = Request("net.pt", scheme="int8-dynamic", target="onnx", dry_run=True, input="3x33")
    report = lower_file(request)
    assert "dry run: nothing was written" in report.remarks
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "net.pt"]


def test_budgets(folder):
    request = {"scheme": "int8-static", "target": "onnx", "calib": "data.npz"}
    with pytest.raises(errors.BudgetError):
        lower_file(Request("net.pt", **request, min_sqnr=90))
    with pytest.raises(errors.CoverageError):
        lower_file(Request("net.pt", **request, ignore=("0",), min_coverage=0.9))
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "net.pt"]


def test_qkit_does_not_load_what_another_runtime_runs(folder, same_process):
    lower_file(Request("net.pt", scheme="int8-static", target="onnx", calib="data.npz", output="o"))
    from qkit import load

    for use in (load, inspect):
        with pytest.raises(errors.RequestError, match="for onnx"):
            use("o")
