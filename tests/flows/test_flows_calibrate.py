"""Calibration sees what each layer really gets, and says where it got nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import UsageError
from qkit.flows import calibrate
from qkit.flows.calibrate import collect, passes
from qkit.models import Inputs


def given(x: torch.Tensor, **named: torch.Tensor) -> Inputs:
    return Inputs((x,), named, "the test")


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(50, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.fc(self.embed(input_ids))


def test_the_inputs_of_each_layer(mlp):
    x = torch.randn(21, 33)
    stats = collect(mlp, {"0": [mlp[0]], "2": [mlp[2]]}, given(x))
    with torch.no_grad():
        hidden = mlp[1](mlp[0](x))
    assert [s.vectors for s in stats.values()] == [21, 21]
    torch.testing.assert_close(stats["0"].moment[0], moment(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["2"].moment[0], moment(hidden), rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in mlp.modules())


def test_hidden_positions_do_not_count():
    model, ids = Masked(), torch.randint(0, 50, (9, 4))
    mask = torch.tensor([1, 1, 1, 0]).expand(9, 4)
    stats = collect(
        model, {"fc": [model.fc]}, Inputs((), {"input_ids": ids, "attention_mask": mask}, "")
    )
    assert stats["fc"].vectors == 27
    with torch.no_grad():
        torch.testing.assert_close(
            stats["fc"].moment[0],
            moment(model.embed(ids[:, :3]).flatten(0, 1)),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_weight_with_two_users_learns_from_both():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    model, x = nn.Sequential(a, nn.ReLU(), b), torch.randn(10, 4)
    stats = collect(model, {"0": [a, b]}, given(x))
    assert stats["0"].vectors == 20


def test_large_models_take_several_passes(mlp, monkeypatch):
    layers = {"0": mlp[0], "2": mlp[2]}
    assert list(passes(layers)) == [["0", "2"]]
    monkeypatch.setattr(calibrate, "PASS_BYTES", 4 * 33 * 33)
    assert list(passes(layers)) == [["0"], ["2"]]
    x = torch.randn(64, 33)
    one_by_one, _ = qkit.quantize(mlp, "w4a16-g8", calib=x, latency=False)
    monkeypatch.undo()
    together, _ = qkit.quantize(mlp, "w4a16-g8", calib=x, latency=False)
    assert torch.equal(one_by_one(x), together(x))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w4a16-g8-asym", "w3a16-channel"])
def test_calibrated_outputs_are_closer(cnn, scheme):
    x = torch.rand(64, 3, 9, 9)
    learnt, report = qkit.quantize(cnn, scheme, calib=x, latency=False)
    rounded, _ = qkit.quantize(cnn, scheme, calib=x, algorithm="rtn", latency=False)
    assert {row.algorithm for row in report.layers if row.scheme} == {"gptq"}
    assert {rule["algorithm"] for rule in report.recipe["rules"]} == {"gptq"}
    with torch.no_grad():
        want = cnn(x)
        errors = [float((model(x) - want).square().sum()) for model in (learnt, rounded)]
    assert errors[0] < errors[1]


def test_grouped_convolutions_and_other_geometries():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 6, (1, 3), groups=2, stride=2, dilation=(1, 2)),
    ).eval()
    _, report = qkit.quantize(model, "w4a16-channel", calib=torch.randn(8, 4, 9, 9), latency=False)
    assert [row.algorithm for row in report.layers] == ["gptq", "gptq"]


def test_eight_bits_are_rounded(mlp):
    _, report = qkit.quantize(mlp, "w8a16", calib=torch.randn(8, 33), latency=False)
    assert {row.algorithm for row in report.layers} == {"rtn"}


def test_a_layer_that_no_data_reaches_is_rounded_and_says_so():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(9, 9), nn.Linear(9, 9)

        def forward(self, x):
            return self.used(x)

    _, report = qkit.quantize(Spare(), "w4a16-g8", calib=torch.randn(8, 9), latency=False)
    used, spare = report.layers
    assert (used.algorithm, spare.algorithm) == ("gptq", "rtn")
    assert "no calibration data reached it" in spare.note


def test_requests_that_make_no_sense(mlp):
    with pytest.raises(UsageError, match=r"needs data.*--calib"):
        qkit.quantize(mlp, "w4a16", algorithm="gptq")
    with pytest.raises(UsageError, match=r"unknown algorithm.*wanted: gptq"):
        qkit.quantize(mlp, "w4a16", algorithm="gptk")


def test_what_is_compared_is_bounded(mlp):
    _, report = qkit.quantize(mlp, "w4a16-g8", calib=torch.randn(500, 33), latency=False)
    assert report.error["inputs"].endswith("the first 64")
