"""What each layer costs, in graphs and in modules; and the list of layers to leave in float."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command import qkit as command
from families.convolutional import mobilenet
from families.family import Family, images
from graph_models import Encoder
from torch import Tensor, nn

import qkit
from qkit.errors import BudgetError, RequestError, UsageError
from qkit.flows import lower
from qkit.flows.evaluate import as_inputs
from qkit.flows.per_layer import GraphModel, ModuleModel, _counts, per_layer
from qkit.flows.pt2e import convert, prepare
from qkit.report import compare
from qkit.spec import Recipe, Rule, parse


def sqnr(a: Tensor, b: Tensor) -> float:
    found = compare([a], [b]).sqnr_db
    return float("inf") if found is None else found


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    return Family("m", mobilenet, lambda: {"x": images(16, 3, 33)}).model()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return images(16, 3, 33)


@pytest.mark.parametrize("dialect", ["onnx", "inductor"])
def test_all_none_and_some_layers_of_a_graph(mobile, pictures, dialect):
    prepared = prepare(mobile, "int8-static", pictures, dialect=dialect)
    graph = GraphModel(prepared, as_inputs(pictures))
    everything = convert(mobile, "int8-static", pictures, dialect=dialect).module(pictures)
    assert torch.equal(graph.run(graph.layers)[0][0], everything)
    with torch.no_grad():
        reference = mobile(pictures)
    # Folding the batch-norms is all that differs.
    assert sqnr(reference, graph.run(())[0][0]) > 100
    # Skipping some is what a recipe that ignores them makes.
    skip = ["1.body.1.0", "2.body.3.0"]
    kept = [name for name in graph.layers if name not in skip]
    real = convert(mobile, "int8-static", pictures, dialect=dialect, ignore=skip).module(pictures)
    assert abs(sqnr(reference, graph.run(kept)[0][0]) - sqnr(reference, real)) < 0.5


def test_dynamic_layers_of_a_graph():
    model, ids = Encoder().eval(), torch.randint(0, 31, (8, 9))
    graph = GraphModel(prepare(model, "int8-dynamic", ids), as_inputs(ids))
    name = "body.layers.0.linear1"
    only = Recipe((Rule(name, parse("int8-dynamic")),))
    alone = convert(model, only, ids).module(ids)
    assert torch.equal(graph.run([name])[0][0], alone)


class Outliers(nn.Module):
    """Three layers, of which ``bad`` sees a channel a thousand times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bad, self.last = nn.Linear(33, 31), nn.Linear(31, 29), nn.Linear(29, 7)
        self.more = nn.ModuleList(nn.Linear(7, 7) for _ in range(6))
        with torch.no_grad():
            self.first.weight[3] *= 1000
            self.bad.weight[:, 3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.tanh(self.bad(self.first(x))))
        for layer in self.more:
            x = x + layer(torch.tanh(x))
        return x


@pytest.fixture
def outliers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return Outliers().eval(), torch.randn(64, 33)


def test_the_bad_layer_is_found_and_the_gain_is_real(outliers, tmp_path, same_process):
    model, x = outliers
    # Biases that are corrected are judged as they were before: what is said holds without.
    report = lower(model, "int8-static", tmp_path / "out", calib=x, algorithm="rtn")
    found = qkit.compare(model, tmp_path / "out", x, per_layer=True).per_layer
    assert found.reproduced
    assert found.layers[0].name in ("bad", "first")  # whose output and input it is
    assert len(found.layers) == 9
    assert 1 <= len(found.skip) <= 2
    assert found.gain_db >= 3
    # Applying the list gains what was said. The report's error is that of 64 samples, the list's of
    # 16 of them: between those, 0.5 dB is the spread of such a mean.
    again = lower(model, "int8-static", None, calib=x, ignore=found.skip, algorithm="rtn")
    gained = again.error["sqnr_db"] - report.error["sqnr_db"]
    assert abs(gained - found.gain_db) < 0.5
    other = qkit.compare(model, tmp_path / "out", 3 * x, per_layer=True).per_layer
    assert other.reproduced is False


def test_what_was_fitted_is_made_again_too(outliers, tmp_path, same_process):
    model, x = outliers
    lower(model, "int8-static", tmp_path / "out", calib=x, algorithm="bias-correction")
    assert qkit.compare(model, tmp_path / "out", x, per_layer=True).per_layer.reproduced
    other = qkit.compare(model, tmp_path / "out", 3 * x, per_layer=True).per_layer
    assert other.reproduced is False


def test_modules_alone_and_the_gain(outliers):
    model, x = outliers
    with torch.no_grad():
        model.last.weight[2, 3] = 40  # an outlier that takes all levels of its row
    qmodel, report = qkit.quantize(model, "w4a16", inputs=x, latency=False)
    result = qkit.compare(model, qmodel, x, per_layer=True)
    costs = {row.name: row for row in result.per_layer.layers}
    # Alone is what quantizing only this layer gives.
    only = Recipe((Rule("last", parse("w4a16")),))
    alone, _ = qkit.quantize(model, only, inputs=x, latency=False)
    with torch.no_grad():
        assert costs["last"].isolated_db == pytest.approx(sqnr(model(x[:16]), alone(x[:16])))
    assert result.per_layer.layers[0].isolated_db == min(c.isolated_db for c in costs.values())
    assert result.output.sqnr_db == report.error["sqnr_db"]
    skip = result.per_layer.skip
    again, _ = qkit.quantize(model, "w4a16", inputs=x, ignore=skip, latency=False)
    with torch.no_grad():
        assert result.per_layer.skip_db == pytest.approx(sqnr(model(x[:16]), again(x[:16])))
    assert result.per_layer.gain_db >= 1
    json.dumps(result.to_json(), allow_nan=False)


def test_noise_that_is_spread_evenly_names_no_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).eval()
    qmodel, _ = qkit.quantize(model, "w8a16", latency=False)
    found = per_layer(ModuleModel(model, qmodel, as_inputs(torch.randn(16, 16))), "x", gain=30)
    assert found.skip in ([], [found.layers[0].name])
    assert found.gain_db < 30


def test_lengths_of_lists_that_are_tried():
    assert list(_counts(0)) == []
    assert list(_counts(1)) == [1]
    assert list(_counts(13)) == [1, 2, 3, 4, 6, 8, 12, 13]


def test_what_cannot_be_judged(mlp, tmp_path, same_process):
    x = torch.randn(20, 33)
    with pytest.raises(UsageError, match="no quantized layer in common"):
        qkit.compare(mlp, mlp, x, per_layer=True)
    lower(mlp, "w4a16-g32", tmp_path / "weights", calib=x)
    with pytest.raises(RequestError, match="weights alone"):
        qkit.compare(mlp, tmp_path / "weights", x, per_layer=True)
    torch.save(mlp.state_dict(), tmp_path / "state.pt")
    with pytest.raises(UsageError, match="without an architecture"):
        qkit.compare(tmp_path / "state.pt", tmp_path / "weights", x, per_layer=True)


def test_the_command(mlp, tmp_path, same_process):
    torch.save(mlp, tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(40, 33)))
    lower(mlp, "int8-static", tmp_path / "out", calib=torch.randn(40, 33))
    told = command("compare", "net.pt", "out", "--per-layer", "--calib", "data.npz", cwd=tmp_path)
    assert told.code == 0, told.err
    assert "SQNR alone" in told.out
    assert "calibrated with other data" in told.out
    assert command("compare", "net.pt", "out", "--per-layer", "--gain", "0", cwd=tmp_path).code == 2


def test_a_goal_leaves_the_worst_layers_in_float(outliers, tmp_path):
    model, x = outliers
    plain = lower(model, "int8-static", None, calib=x).error["sqnr_db"]
    goal = plain + 3
    report = lower(model, "int8-static", None, calib=x, goal_sqnr=goal)
    assert report.error["sqnr_db"] >= goal
    left = [row.name for row in report.layers if row.scheme is None]
    assert 1 <= len(left) <= 2
    assert any("stay in float for --goal-sqnr" in remark for remark in report.remarks)
    with pytest.raises(BudgetError, match="too far"):
        lower(model, "int8-static", None, calib=x, goal_sqnr=90)
    with pytest.raises(UsageError, match="int8-static and int8-dynamic"):
        lower(model, "w4a16-g32", None, calib=x, goal_sqnr=20)
    # What is there already costs nothing.
    easy = lower(model, "int8-static", None, calib=x, goal_sqnr=plain - 3)
    assert easy.coverage["layers_left"] == 0
