"""``qkit.compare``: modules, model files and artifacts, with and without an architecture."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import InputError, UsageError


@pytest.fixture
def paths(net, x, tmp_path, same_process):
    """The same model as a file of tensors, and as artifacts of several kinds."""
    torch.save(net.state_dict(), tmp_path / "state.pt")
    for scheme in ("w8a16", "w4a16-g32"):
        qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
        qkit.save(qmodel, tmp_path / scheme, inputs=x, report=report)
    qkit.save(qmodel, tmp_path / "tensors", report=report)
    return tmp_path


def rows(result: qkit.flows.Comparison) -> dict[str, tuple[str, float | None]]:
    return {row.name: (row.what, row.error.sqnr_db) for row in result.layers}


def test_a_model_with_itself(net, x):
    result = qkit.compare(net, net, x)
    assert result.output.sqnr_db is None
    assert result.output.max_abs == 0
    assert result.only_in_a == result.only_in_b == []
    assert rows(result) == dict.fromkeys(("conv", "norm", "body.fc1", "body.fc2"), ("output", None))


def test_a_quantized_model_in_memory(net, x):
    qmodel, report = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    result = qkit.compare(net, qmodel, x)
    assert result.output.to_json() == {k: report.error[k] for k in ("sqnr_db", "cosine", "max_abs")}
    assert result.layers[0].kinds == ("Conv2d", "QConv2d")
    assert result.inputs == "given by the caller"
    assert all(row.error.sqnr_db > 30 for row in result.layers)


@pytest.mark.parametrize("turn", [False, True], ids=["model first", "artifact first"])
def test_a_model_and_its_artifact_layer_by_layer(turn, net, paths):
    pair = (paths / "w8a16", net) if turn else (net, paths / "w8a16")
    result = qkit.compare(*pair)
    assert {what for what, _ in rows(result).values()} == {"output"}
    assert len(result.layers) == 4
    assert result.output.sqnr_db > 30
    assert "check.safetensors" in result.inputs if turn else "inferred" in result.inputs


def test_a_model_file_of_tensors_and_its_artifact(paths):
    result = qkit.compare(paths / "state.pt", paths / "tensors")
    assert result.output is None
    assert {what for what, _ in rows(result).values()} == {"weight"}
    assert 15 < rows(result)["body.fc1"][1] < 30
    assert rows(result)["norm"] == ("weight", None)


def test_two_artifacts(paths):
    result = qkit.compare(paths / "w8a16", paths / "w4a16-g32")
    assert 10 < result.output.sqnr_db < 35  # by their programs
    assert result.inputs.endswith("check.safetensors")
    assert rows(result)["body.fc1"][0] == "weight"
    assert 15 < rows(result)["body.fc1"][1] < 30
    same = qkit.compare(paths / "w4a16-g32", paths / "tensors")
    assert same.output is None
    assert {db for _, db in rows(same).values()} == {None}


def test_another_architecture_does_not_get_in_the_way(paths, x):
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)).eval()
    result = qkit.compare(other, paths / "w8a16", x)
    assert result.output.sqnr_db < 10
    assert result.only_in_a == ["1"]
    assert "conv" in result.only_in_b


def test_nothing_is_changed(net, paths, x):
    net.train()
    before = copy.deepcopy(net.state_dict())
    qkit.compare(net, paths / "w8a16", x)
    qkit.compare(net, paths / "w8a16")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


def test_models_of_different_types(mlp):
    x = torch.randn(4, 33)
    for pair in ((mlp, copy.deepcopy(mlp).half()), (copy.deepcopy(mlp).bfloat16(), mlp)):
        assert 30 < qkit.compare(*pair, x).output.sqnr_db < 90


def test_json_is_strict():
    zero, one = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for p in zero.parameters():
            p.zero_()
    result = qkit.compare(zero, one, torch.ones(1, 2))
    assert result.output.sqnr_db == -math.inf
    assert result.to_json()["output"]["sqnr_db"] is None


def test_models_without_a_common_layer(tmp_path):
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "a.pt")
    torch.save({"b.weight": torch.randn(4, 4)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="no layer in common"):
        qkit.compare(tmp_path / "a.pt", tmp_path / "b.pt")


def test_outputs_that_do_not_correspond(mlp):
    with pytest.raises(InputError, match="do not correspond"):
        qkit.compare(mlp, mlp[0], torch.randn(2, 33))


def test_inputs_for_tensors(paths, x):
    with pytest.raises(UsageError, match="cannot be run"):
        qkit.compare(paths / "state.pt", paths / "tensors", x)
