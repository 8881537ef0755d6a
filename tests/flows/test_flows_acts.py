"""Quantized activations, codebooks and narrow floats from the model to the artifact and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkit
from qkit.errors import CoverageError, InputError, UsageError, VerificationError
from qkit.nn import QConv2d, QLinear
from qkit.numerics.codebook import fit_codebook
from qkit.spec import Codebook, PerTensor, QSpec, Scheme
from qkit.targets.artifact import META, WEIGHTS, read_artifact, write_meta

SCHEMES = ["w8a8", "w8a8-static", "w4a8-g32", "w4a8-g32-static", "nf4-g64", "nf4-channel"]
FLOATS = ["fp8-e4m3", "fp8-e5m2", "fp8-e4m3-channel", "fp8-e5m2-g16", "mxfp4-e2m1", "mxfp8-e4m3"]


class Mlp(nn.Sequential):
    """Odd sizes on purpose."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))


class Tied(nn.Module):
    """Two layers with one weight that see inputs of different ranges, and a bias of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 9)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(10 * self.a(x).relu())


class Unreached(nn.Module):
    """One layer is there and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def calib_of(scheme: str, x: torch.Tensor) -> torch.Tensor | None:
    return x if scheme.endswith("static") else None


def made(path: Path, scheme, model: nn.Module, x: torch.Tensor, calib=None):
    data = {"inputs": x} if calib is None else {"calib": calib}
    qmodel, report = qkit.quantize(model, scheme, latency=False, **data)
    qkit.save(qmodel, path, inputs=x, report=report)
    return qmodel, report


@pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATS])
def test_quantize_save_verify_load_compare(scheme, tmp_path, same_process):
    net, x, out = Mlp().eval(), torch.randn(20, 33), tmp_path / "out"
    qmodel, report = made(out, scheme, net, x, calib_of(scheme, x))
    assert report.verification["bit_identical"]
    assert all(isinstance(qmodel[i], QLinear) for i in (0, 2))
    assert [row.scheme for row in report.layers if row.scheme] == [qkit.parse(scheme).name] * 2
    assert qkit.verify(out)["status"] == "verified"
    with torch.no_grad():
        want = qmodel(x)
        assert torch.equal(qkit.load(out, into=Mlp)(x), want)
        assert torch.equal(qkit.load(out)(x), want)  # the program
    assert qkit.compare(qmodel, out, x).output.max_abs == 0
    # A uniform error of step/2 in 8 or 4 bits leaves more than this of a Gaussian.
    assert report.error["sqnr_db"] > (25 if scheme.startswith("w8") else 10)


def test_one_artifact_is_verified_by_a_fresh_process(tmp_path):
    made(tmp_path / "out", "w8a8-static", Mlp().eval(), x := torch.randn(20, 33), x)
    assert qkit.verify(tmp_path / "out")["status"] == "verified"


def test_static_ranges_are_those_of_the_data(tmp_path):
    net, x = Mlp().eval(), torch.randn(50, 33)
    qmodel, _ = qkit.quantize(net, "w8a8-static", calib=x, latency=False)
    with torch.no_grad():
        inputs = {0: x, 2: net[0](x).relu()}
    for at, given in inputs.items():
        low, high = min(0.0, float(given.min())), max(0.0, float(given.max()))
        scale = (high - low) / 255
        assert float(qmodel[at].input_scale) == pytest.approx(scale, rel=2.0**-22)
        assert int(qmodel[at].input_zero_point) == -128 - round(low / scale)


def test_static_ranges_need_data():
    with pytest.raises(UsageError, match="learnt from data") as caught:
        qkit.quantize(Mlp(), "w8a8-static", inputs=torch.randn(2, 33))
    assert caught.value.exit_code == 2
    assert "--calib" in caught.value.fix


def test_a_layer_that_the_data_never_reached():
    x = torch.randn(4, 9)
    with pytest.raises(InputError, match="reached no input") as caught:
        qkit.quantize(Unreached().eval(), "w8a8-static", calib=x)
    assert caught.value.exit_code == 3
    assert caught.value.got == "spare"
    qmodel, _ = qkit.quantize(
        Unreached().eval(), "w8a8-static", calib=x, ignore=["spare"], latency=False
    )
    assert isinstance(qmodel.used, QLinear)
    assert type(qmodel.spare) is nn.Linear


def test_a_learnt_codebook(tmp_path, same_process):
    net, x = Mlp().eval(), torch.randn(20, 33)
    weight = net[0].weight.detach()
    entries = fit_codebook(weight / weight.abs().max(), 11).reshape(-1).tolist()
    scheme = Scheme(QSpec(Codebook("learnt", tuple(entries)), PerTensor()))
    qmodel, report = made(tmp_path / "out", scheme, net, x)
    assert report.verification["bit_identical"]
    with torch.no_grad():
        for model in (qkit.load(tmp_path / "out", into=Mlp), qkit.load(tmp_path / "out")):
            assert torch.equal(model(x), qmodel(x))
    (facts, *_) = read_artifact(tmp_path / "out").layers.values()
    assert facts.spec == scheme.weight


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "nf4-channel"])
def test_tied_weights_have_one_weight_and_a_range_each(scheme, tmp_path, same_process):
    net, x = Tied().eval(), torch.randn(30, 9)
    qmodel, _ = made(tmp_path / "out", scheme, net, x, calib_of(scheme, x))
    loaded = qkit.load(tmp_path / "out", into=Tied)
    for model in (qmodel, loaded):
        assert model.a.stored_weight is model.b.stored_weight
        assert model.a.bias is not model.b.bias
        if scheme.endswith("static"):
            assert model.b.input_scale > 1.5 * model.a.input_scale
    with torch.no_grad():
        assert torch.equal(loaded(x), qmodel(x))
        assert torch.equal(qkit.load(tmp_path / "out")(x), qmodel(x))
    assert qkit.compare(net, qmodel, x).output.sqnr_db > 10


def test_convolutions_are_listed_as_left_with_the_reason(cnn, tmp_path, same_process):
    x = torch.randn(3, 3, 12, 12)
    qmodel, report = made(tmp_path / "out", "w8a8", cnn, x)
    assert isinstance(qmodel[6], QLinear)
    assert not any(isinstance(module, QConv2d) for module in qmodel.modules())
    rows = [row for row in report.layers if row.kind == "Conv2d"]
    assert len(rows) == 2
    assert all("no kernel with quantized activations" in row.reason for row in rows)
    with pytest.raises(CoverageError, match="quantized activations"):
        qkit.quantize(nn.Sequential(nn.Conv2d(3, 4, 1)), "w8a8")


@pytest.mark.parametrize("way", ["another", "none", "of two"])
def test_a_static_range_that_was_changed(way, tmp_path, same_process):
    x, out = torch.randn(20, 33), tmp_path / "out"
    made(out, "w8a8-static", Mlp().eval(), x, x)
    tensors = load_file(out / WEIGHTS)
    if way == "none":
        del tensors["0.input_scale"]
    else:
        tensors["0.input_scale"] = tensors["0.input_scale"] * 2
        if way == "of two":
            tensors["0.input_scale"] = tensors["0.input_scale"].repeat(2)
    save_file(tensors, out / WEIGHTS)
    write_meta(out, read_artifact(out).meta)
    if way != "another":
        with pytest.raises(InputError, match="input_scale"):
            qkit.load(out, into=Mlp)
    with pytest.raises((InputError, VerificationError)) as caught:
        qkit.verify(out)
    assert caught.value.exit_code in (3, 4)
    assert (out / META).is_file()
