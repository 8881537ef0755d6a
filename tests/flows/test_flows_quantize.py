"""``qkit.quantize``: what is quantized, what is left and why, and what that costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import CoverageError, InputError, RequestError, UsageError
from qkit.nn import QConv2d, QLayer, QLinear
from qkit.spec import PRESETS, Recipe, Rule, Scheme, parse

INTEGER = [n for n in PRESETS if n.startswith("w") and parse(n).weight_only]
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
PARAMETERS = {"conv": 3 * 6 * 9 + 6, "norm": 12, "fc1": 96 * 33 + 33, "fc2": 33 * 7 + 7, "": 7}
TOTAL = sum(PARAMETERS.values())
# The least SQNR of the output of the small networks here, by bits: about 6 dB a bit.
LEAST_DB = {8: 35, 6: 22, 5: 16, 4: 10, 3: 4, 2: -3}


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QLayer)]


@pytest.mark.parametrize("scheme", INTEGER)
def test_every_preset(scheme, net, x):
    before = copy.deepcopy(net.state_dict())
    qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
    assert quantized(qmodel) == ["conv", "body.fc1", "body.fc2"]
    assert isinstance(qmodel.conv, QConv2d)
    assert isinstance(qmodel.body["fc1"], QLinear)
    assert report.scheme == scheme
    assert report.error["sqnr_db"] > LEAST_DB[parse(scheme).weight.format.bits]
    with torch.no_grad():
        error = (qmodel(x) - net(x)).abs().max()
    assert report.error["max_abs"] == pytest.approx(float(error))
    assert quantized(net) == []
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_coverage_is_exact(net, x):
    _, report = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    done = PARAMETERS["conv"] + PARAMETERS["fc1"] + PARAMETERS["fc2"]
    assert report.coverage == {
        "parameters": TOTAL,
        "quantized_parameters": done,
        "fraction": round(done / TOTAL, 6),
        "layers_quantized": 3,
        "layers_left": 2,
    }


def test_every_owner_of_parameters_has_one_row(net, x):
    _, report = qkit.quantize(net, "w4a16-g32", inputs=x, latency=False)
    owners = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in net.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert [row.name for row in report.layers] == list(owners)
    assert {row.name: row.parameters for row in report.layers} == owners
    for row in report.layers:
        assert (row.scheme is None) == (row.reason is not None)
        assert (row.scheme is None) == (row.bits_per_weight is None)
    assert {row.name: row.scheme for row in report.layers if row.scheme} == dict.fromkeys(
        ("conv", "body.fc1", "body.fc2"), "w4a16-g32"
    )
    reasons = {row.name: row.reason for row in report.layers if row.reason}
    assert "normalisation" in reasons["norm"]
    assert "Net" in reasons[""]


def test_in_place_changes_the_model_itself(net, x):
    wanted, _ = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    qmodel, report = qkit.quantize(net, "w8a16", inputs=x, in_place=True)
    assert qmodel is net
    assert quantized(net) == ["conv", "body.fc1", "body.fc2"]
    with torch.no_grad():
        assert torch.equal(qmodel(x), wanted(x))
    assert report.error["level"] == "weights"  # the float model is gone
    assert report.latency_ms == {}


def test_a_model_that_is_one_layer():
    layer = nn.Linear(16, 8)
    for in_place in (False, True):
        qmodel, report = qkit.quantize(layer, "w8a16", in_place=in_place, latency=False)
        assert isinstance(qmodel, QLinear)
        assert [row.name for row in report.layers] == [""]
        assert report.coverage["fraction"] == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training, net, x):
    net.train(training)
    mean = net.norm.running_mean.clone()
    qmodel, _ = qkit.quantize(net, "w8a16", inputs=x, latency=True)
    assert {m.training for m in net.modules()} == {training}
    assert {m.training for m in qmodel.modules()} == {training}
    assert torch.equal(net.norm.running_mean, mean)
    assert torch.equal(qmodel.norm.running_mean, mean)


# Which layers


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["body.fc2"], ["conv", "body.fc1"]),
        (["body"], ["conv"]),
        (["Linear"], ["conv"]),
        (["Conv2d", "body.fc1"], ["body.fc2"]),
        (["re:.*fc[0-9]"], ["conv"]),
        (["re:body.fc1$"], ["conv", "body.fc2"]),
    ],
    ids=str,
)
def test_ignore(ignore, left, net, x):
    qmodel, report = qkit.quantize(net, "w8a16", ignore=ignore, inputs=x, latency=False)
    assert quantized(qmodel) == left
    assert report.coverage["layers_quantized"] == len(left)
    told = [row.reason for row in report.layers if row.reason and "ignored by" in row.reason]
    assert len(told) >= 3 - len(left)


@pytest.mark.parametrize("name", ["fc2", "linear", "body.fc", "re:fc", "Dropout"])
def test_an_ignored_name_that_matches_nothing(name, net):
    with pytest.raises(UsageError, match="matches no module"):
        qkit.quantize(net, "w8a16", ignore=[name])


def test_a_model_without_parameters_has_nothing_to_quantize():
    with pytest.raises(CoverageError, match="a model without parameters"):
        qkit.quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), "w8a16")


def test_ignoring_everything_is_a_failure(net):
    with pytest.raises(CoverageError, match="nothing was quantized") as caught:
        qkit.quantize(net, "w8a16", ignore=["Linear", "Conv2d"])
    assert caught.value.exit_code == 5


def test_a_recipe_with_two_schemes(net, x):
    recipe = Recipe(
        (Rule("body.fc2", None), Rule("Conv2d", parse("w8a16")), Rule("*", parse("w4a16-g32")))
    )
    qmodel, report = qkit.quantize(net, recipe, inputs=x, latency=False)
    schemes = {row.name: row.scheme for row in report.layers if row.scheme}
    assert schemes == {"conv": "w8a16", "body.fc1": "w4a16-g32"}
    assert (qmodel.conv.bits, qmodel.body["fc1"].bits) == (8, 4)
    assert Recipe.from_json(report.recipe) == recipe


@pytest.mark.parametrize(
    ("size", "scheme"), [(16, "w4a16-g16"), (-1, "w4a16-channel"), (None, "w4a16-g128")]
)
def test_group_size(size, scheme, net, x):
    qmodel, report = qkit.quantize(net, "w4a16", group_size=size, inputs=x, latency=False)
    assert report.scheme == scheme
    assert qmodel.body["fc1"].group == max(size if size is not None else 128, 0)


# Tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_tied_weights_stay_tied_and_count_once():
    qmodel, report = qkit.quantize(Tied(), "w8a16", latency=False)
    assert qmodel.first.stored_weight is qmodel.second.stored_weight
    assert [row.parameters for row in report.layers] == [24 * 24 + 24, 0]
    assert report.layers[1].note == "tied to first"
    assert report.coverage["parameters"] == 24 * 24 + 24
    assert report.coverage["fraction"] == 1.0


def test_a_weight_that_is_tied_to_something_in_float_stays_in_float():
    _, report = qkit.quantize(
        nn.Sequential(Tied(), nn.Linear(24, 3)), "w8a16", ignore=["0.second"], latency=False
    )
    assert {row.name: bool(row.scheme) for row in report.layers} == {
        "0.first": False,
        "0.second": False,
        "1": True,
    }
    assert "shares its weight" in report.layers[0].reason


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym"])
def test_models_of_other_types(scheme, dtype, mlp):
    model, x = mlp.to(dtype), torch.randn(4, 33, dtype=dtype)
    qmodel, report = qkit.quantize(model, scheme, inputs=x, latency=False)
    with torch.no_grad():
        assert qmodel(x).dtype == dtype
    assert report.error["sqnr_db"] > LEAST_DB[parse(scheme).weight.format.bits]
    assert report.size_bytes["source"] == sum(p.numel() for p in mlp.parameters()) * dtype.itemsize


@pytest.mark.parametrize("scheme", CASTS)
def test_casts(scheme, net, x):
    qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
    types = {p.dtype for p in qmodel.parameters()} | {qmodel.norm.running_mean.dtype}
    assert types == {CASTS[scheme]}
    assert qmodel.norm.num_batches_tracked.dtype == torch.int64
    assert report.coverage["fraction"] == 1.0
    assert report.coverage["parameters"] == TOTAL
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert report.error["sqnr_db"] > 25
    assert report.kernels == {}


def test_a_cast_that_overflows_names_the_tensor(mlp):
    with torch.no_grad():
        mlp[2].weight[1, 1] = 1e6
    with pytest.raises(RequestError, match=r"too large for fp16.*2\.weight.*bf16"):
        qkit.quantize(mlp, "fp16")
    qkit.quantize(mlp, "bf16", latency=False)


def test_a_cast_has_no_rules(net):
    with pytest.raises(UsageError, match="whole model"):
        qkit.quantize(net, "fp16", ignore=["conv"])


# Inputs


def test_inputs_of_every_form(net, x):
    wanted = qkit.quantize(net, "w8a16", inputs=x, latency=False)[1].error
    for given in ([x], (x,), {"x": x}):
        got = qkit.quantize(net, "w8a16", inputs=given, latency=False)[1].error
        assert got == wanted
        assert got["inputs"] == "given by the caller"
        assert got["level"] == "model"


def test_inputs_are_inferred(net):
    _, report = qkit.quantize(net, "w8a16", latency=False)
    assert report.error["level"] == "model"
    assert "inferred" in report.error["inputs"]


def test_where_no_inputs_can_be_inferred_weights_are_compared():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * mask

    _, report = qkit.quantize(Two(), "w8a16")
    assert report.error["level"] == "weights"
    assert report.error["sqnr_db"] == report.layers[0].sqnr_db > 35
    assert report.latency_ms == {}
    assert report.kernels == {}
    assert any("no inputs" in remark for remark in report.remarks)


def test_inputs_that_do_not_fit_are_refused_before_any_work(net):
    told = []
    with pytest.raises(InputError, match="fails on the inputs"):
        qkit.quantize(
            net, "w8a16", inputs=torch.randn(2, 5), progress=lambda *args: told.append(args)
        )
    assert told == []


@pytest.mark.parametrize("bad", [[1, 2], ["x"]], ids=str)
def test_inputs_that_are_no_tensors(bad, net):
    with pytest.raises(UsageError, match="tensors"):
        qkit.quantize(net, "w8a16", inputs=bad)


# Refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["body.fc1.weight", "conv.bias"])
def test_a_tensor_that_is_not_finite_is_named(name, value, net, x):
    with torch.no_grad():
        net.get_parameter(name).view(-1)[3] = value
    with pytest.raises(InputError, match="not finite"):
        qkit.quantize(net, "w8a16", inputs=x)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        qkit.quantize(net, "w8a16")


@pytest.mark.parametrize("name", ["norm.weight", "norm.running_var", "scale"])
def test_nan_in_a_tensor_that_is_left_in_float(name, net, x):
    with torch.no_grad():
        net.state_dict()[name][0] = float("nan")
    for given in (x, None):
        with pytest.raises(InputError, match=rf"not finite.*{name}"):
            qkit.quantize(net, "w8a16", inputs=given)


def test_an_infinite_mask_is_no_damage(mlp):
    mlp.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    qmodel, _ = qkit.quantize(mlp, "w8a16", latency=False)
    assert torch.equal(qmodel.mask, mlp.mask)


def test_nothing_to_quantize():
    with pytest.raises(CoverageError, match="LayerNorm"):
        qkit.quantize(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), "w8a16")


def test_a_scheme_that_the_target_cannot_express(net):
    with pytest.raises(RequestError, match="fp8-e4m3 weights with quantized") as caught:
        qkit.quantize(net, Scheme(parse("fp8-channel").weight, parse("w8a8").input))
    assert caught.value.exit_code == 7
    assert "--scheme fp8-e4m3-channel" in caught.value.fix


def test_unknown_names(net):
    with pytest.raises(UsageError, match="unknown scheme"):
        qkit.quantize(net, "w8a61")
    with pytest.raises(UsageError, match="unknown target"):
        qkit.quantize(net, "w8a16", target="tirch")


def test_progress_counts_the_layers(net, x):
    told = []
    qkit.quantize(net, "w8a16", inputs=x, latency=False, progress=lambda *args: told.append(args))
    assert told == [(0, 3, "conv"), (1, 3, "body.fc1"), (2, 3, "body.fc2"), (3, 3, "")]


def test_a_group_size_beyond_every_row_is_said(net, x):
    _, report = qkit.quantize(net, "w4a16-g128", inputs=x, latency=False)
    notes = {row.name: row.note for row in report.layers if row.note}
    assert notes == {
        "conv": "one group of 27 a row",
        "body.fc1": "one group of 96 a row",
        "body.fc2": "one group of 33 a row",
    }
