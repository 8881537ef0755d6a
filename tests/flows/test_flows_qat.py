"""Quantization-aware training: from a model and data to an artifact of a runtime."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import pytest
import torch
from graph_models import ResNet
from torch import Tensor, fx, nn

from qkit import errors
from qkit.flows import lower
from qkit.flows.demo import Digits, accuracy, load_digits
from qkit.flows.demo import train as train_float
from qkit.flows.pt2e import resolve
from qkit.flows.qat import Qat, Tuned, train_quantized, trained_scheme
from qkit.flows.train import TrainOptions, labelled
from qkit.graph import DIALECTS
from qkit.graph.annotate import annotation
from qkit.graph.fake import PerChannelFake, PerChannelLearned
from qkit.report import Report
from qkit.spec import Int, PerChannel, PerTensor, QSpec
from qkit.targets.backend import backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def resnet(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet()
    train_float(model, digits, epochs=2)
    return model


def qat(digits: Digits, **given) -> Qat:
    # The ranges move in the first two epochs; in the last one they and the statistics stay.
    options = TrainOptions(epochs=3, lr=1e-3, batch_size=64)
    data = labelled(digits.train_x, digits.train_y, "the digits")
    return Qat(data, **{"options": options} | given)


@pytest.mark.parametrize("target", ["onnx", "xnnpack"])
def test_digits_within_three_tenths_of_a_point(resnet, digits, tmp_path, target):
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    report = lower(resnet, "int8-qat", tmp_path / "out", target=target, qat=qat(digits))
    runtime = backend(target)
    session = runtime.load(tmp_path / "out" / runtime.file, 1)
    size = 50  # a program of ExecuTorch plans memory for 64
    found = [session((x,), {})[0].argmax(1) for x in digits.test_x.split(size)]
    right = 100 * float((torch.cat(found) == digits.test_y).float().mean())
    assert right >= accuracy(resnet, digits) - 0.3
    assert report.verification["fresh_process"]
    assert report.coverage["layers_quantized"] == 6
    assert {row.algorithm for row in report.layers if row.scheme} == {"qat"}
    identity = report.training["identity_db"]
    assert identity is None or identity > 100  # what is converted is what was trained
    assert report.metrics["accuracy"]["trained int8"] > 95
    assert len(report.training["history"]) == 3
    assert not any("output error is large" in remark for remark in report.remarks)
    stored = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert stored.training == json.loads(json.dumps(report.training))
    # The user's model is as it was.
    assert all(torch.equal(t, before[name]) for name, t in resnet.state_dict().items())
    if target == "onnx":  # nothing but integers
        assert report.kernels["QLinearConv"] == 5
        assert not any("left between kernels" in remark for remark in report.remarks)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


FEW = TrainOptions(epochs=3, lr=2e-3, batch_size=32)


def small(digits: Digits, model: nn.Module, quantizer=None, **given) -> Tuned:
    data = labelled(digits.train_x[:160], digits.train_y[:160])
    return train_quantized(
        model,
        resolve("int8-static", ()),
        Qat(data, **{"options": FEW} | given),
        dialect=DIALECTS["onnx"],
        quantizer=quantizer,
    )


def same(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stopped_and_resumed_it_converts_to_the_same(digits, tmp_path):
    model = Small()
    want = small(digits, model)
    stop_in_the_last_epoch(digits, model, folder=tmp_path)
    again = small(digits, model, folder=tmp_path, resume=True)
    assert same(again.converted.module, want.converted.module)
    with pytest.raises(errors.UsageError, match=r"another one.*teacher"):
        small(digits, model, folder=tmp_path, resume=True, teacher=0.5)


def stop_in_the_last_epoch(digits, model, **more):
    """A training that is interrupted where ranges and statistics stay; its checkpoint is there."""

    def interrupt(done: int, total: int, text: str) -> None:
        if done == 13:
            raise KeyboardInterrupt

    data = labelled(digits.train_x[:160], digits.train_y[:160])
    with pytest.raises(KeyboardInterrupt):
        train_quantized(
            model,
            resolve("int8-static", ()),
            Qat(data, options=replace(FEW, save_seconds=0), **more),
            dialect=DIALECTS["onnx"],
            progress=interrupt,
        )


def test_the_float_model_teaches(digits):
    """With the teacher alone, and labels that are wrong, the student stays with the teacher."""
    torch.manual_seed(0)
    model = Small()
    train_float(model, digits, epochs=2)
    wrong = labelled(digits.train_x[:320], (digits.train_y[:320] + 1) % 10)

    def agreement(teacher: float) -> float:
        tuned = train_quantized(
            model,
            resolve("int8-static", ()),
            Qat(wrong, options=replace(FEW, keep="last"), teacher=teacher),
            dialect=DIALECTS["onnx"],
        )
        with torch.no_grad():
            ours = tuned.converted.module(digits.test_x).argmax(1)
            return float((ours == model(digits.test_x).argmax(1)).float().mean())

    assert agreement(1.0) > 0.9
    assert agreement(1.0) > agreement(0.0) + 0.05


def test_four_bits_by_a_quantizer_of_ones_own(digits):
    """No runtime here has such kernels, but what is converted is what was trained (stack-wide, the
    default fake quantizer differs by 15 dB in four bits)."""
    from qkit.graph.annotate import Quantizer, annotate_node
    from qkit.graph.kinds import kind_of

    weight = annotation(QSpec(Int(4, narrow=True), PerChannel(0)), "minmax", PerChannelFake)
    acts = annotation(QSpec(Int(8), PerTensor(), False, "static"), "moving-average", PerChannelFake)

    class Four(Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in model.graph.nodes:
                kind = kind_of(node)
                if kind is not None and kind.role == "weighted":
                    annotate_node(node, {node.args[0]: acts, node.args[1]: weight})
            return model

        def validate(self, model: fx.GraphModule) -> None: ...

    tuned = small(digits, Small(), quantizer=Four())
    assert tuned.identity_db is None or tuned.identity_db > 100
    codes = [t for n, t in tuned.converted.module.named_buffers() if t.dtype == torch.int8]
    codes += [t for t in tuned.converted.module.parameters() if t.dtype == torch.int8]
    assert len([t for t in codes if t.dim() > 1]) == 2
    assert max(int(t.abs().max()) for t in codes if t.dim() > 1) == 7


def test_requests_that_make_no_sense(digits):
    assert trained_scheme("INT8_QAT") == "int8-static"
    assert trained_scheme("int8-static") is None
    with pytest.raises(errors.UsageError, match="static ranges"):
        train_quantized(
            Small(),
            resolve("int8-dynamic", ()),
            Qat(labelled(digits.train_x[:9], digits.train_y[:9])),
            dialect=DIALECTS["onnx"],
        )
    with pytest.raises(errors.CoverageError, match="nothing was quantized"):
        train_quantized(
            Small(),
            resolve("int8-static", ["Conv2d", "Linear"]),
            Qat(labelled(digits.train_x[:9], digits.train_y[:9])),
            dialect=DIALECTS["onnx"],
        )
    for wrong in ({"teacher": 2.0}, {"temperature": 0.0}, {"freeze_norms": -1}):
        with pytest.raises(errors.UsageError):
            Qat(labelled(digits.train_x[:9], digits.train_y[:9]), **wrong)


def test_a_network_from_scratch(digits):
    """Random weights are a start too."""
    torch.manual_seed(1)
    data = labelled(digits.train_x[:640], digits.train_y[:640])
    tuned = train_quantized(
        Small(),
        resolve("int8-static", ()),
        Qat(data, options=TrainOptions(epochs=4, lr=5e-3, batch_size=32)),
        dialect=DIALECTS["xnnpack"],
    )
    assert tuned.metrics["accuracy"]["float"] < 40 < 85 < tuned.metrics["accuracy"]["trained int8"]


def test_steps_are_learnt_and_are_what_is_deployed(digits, tmp_path):
    torch.manual_seed(1)
    model = Small()
    train_float(model, digits, epochs=1)
    tuned = {lsq: small(digits, model, lsq=lsq) for lsq in (False, True)}
    assert tuned[True].identity_db is None or tuned[True].identity_db > 100
    steps = {lsq: scales(each.converted.module) for lsq, each in tuned.items()}
    assert len(steps[True]) == len(steps[False]) == 3
    # A step that is trained follows neither the greatest weight nor the observed range.
    assert all(a != b for a, b in zip(steps[True], steps[False], strict=True))
    # Checkpoints hold the steps.
    stop_in_the_last_epoch(digits, model, folder=tmp_path, lsq=True)
    again = small(digits, model, folder=tmp_path, resume=True, lsq=True)
    assert same(again.converted.module, tuned[True].converted.module)


def scales(module: fx.GraphModule) -> list[float]:
    """The steps of the activations of a converted program, in order."""
    nodes = (n for n in module.graph.nodes if "quantize_per_tensor" in str(n.target))
    return [float(n.args[1]) for n in nodes if "dequantize" not in str(n.target)]


def test_learnt_steps_follow_the_gradient():
    """Towards the step of least error, from one that clips and from one that is too coarse."""
    spec = QSpec(Int(4, narrow=True), PerTensor())
    made = annotation(spec, "minmax", PerChannelLearned).observer_or_fake_quant_ctr
    x = torch.randn(4000)

    def error(step: float) -> float:
        codes = (x / step).round().clamp(-7, 7)
        return float((codes * step - x).square().mean())

    best = min((0.05 + 0.002 * i for i in range(400)), key=error)
    for start in (0.3 * best, 3 * best):
        fake = made(dtype=torch.int8, quant_min=-7, quant_max=7, qscheme=torch.per_tensor_symmetric)
        fake(torch.tensor([7 * start, -7 * start]))
        fake.learn()
        adam = torch.optim.Adam(fake.parameters(), lr=0.02)
        for _ in range(200):
            adam.zero_grad()
            (fake(x) - x).square().mean().backward()
            adam.step()
        assert error(float(fake.calculate_qparams()[0])) < 1.05 * error(best)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Inductor's are for x86")
def test_trained_for_inductor_and_run_there(resnet, digits, tmp_path):
    """The compiled package, loaded in its own runtime in a fresh process, is what was trained."""
    out = tmp_path / "out"
    report = lower(resnet, "int8-qat", out, target="inductor", qat=qat(digits, lsq=True))
    assert report.verification["fresh_process"]
    assert report.coverage["integer_layers"] == report.coverage["integer_layers_expected"] == 6
    identity = report.training["identity_db"]
    assert identity is None or identity > 100
    session = backend("inductor").load(out / "model.pt2", 1)
    right = 100 * float(
        (session((digits.test_x,), {})[0].argmax(1) == digits.test_y).float().mean()
    )
    assert right >= accuracy(resnet, digits) - 0.3
