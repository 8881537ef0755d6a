"""Rows and columns that differ in size, beside kernels with one range for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.flows import lower
from qkit.flows.pt2e import convert
from qkit.report import compare

pytestmark = pytest.mark.usefixtures("one_thread")


class Decoder(nn.Module):
    """Attention to what came before: the longer that is, the smaller its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 32)
        self.qkv, self.out = (nn.Linear(32, n, bias=False) for n in (96, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).mul(0.1).unflatten(-1, (3, 1, 32)).transpose(1, 3).unbind(2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm(self.out(x.flatten(0, 1))))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 97, (5, 200))


def test_small_rows_keep_their_codes(ids, monkeypatch):
    model = Decoder().eval()
    with torch.no_grad():
        wanted = model(ids)
    found = {}
    monkeypatch.setattr("qkit.flows.uneven.KEPT_DB", -1.0)
    for level in (39.5, -1.0):
        monkeypatch.setattr("qkit.flows.uneven.ENOUGH_DB", level)
        done = convert(model, "int8-dynamic", ids)
        found[level] = compare([wanted], [done.module(ids)]).sqnr_db
        assert done.expected == 3
        assert any("(out)" in note for note in done.notes) == (level > 0)
    assert found[39.5] > found[-1.0] + 3
    # XNNPACK has a range for each row anyhow.
    assert convert(model, "int8-dynamic", ids, dialect="xnnpack").notes == ()


@pytest.mark.parametrize("target", ["onnx", "inductor"])
def test_they_run_as_integers(ids, tmp_path, target, same_process):
    report = lower(Decoder().eval(), "int8-dynamic", tmp_path / "out", target=target, calib=ids)
    assert report.coverage["integer_layers"] == report.coverage["integer_layers_expected"] == 3
    assert any("differ too much" in remark for remark in report.remarks)
    assert report.error["sqnr_db"] > 30


def test_where_the_outputs_keep_little_all_rows_are_evened(ids, monkeypatch):
    model = Decoder().eval()
    model.head = nn.Linear(32, 11)
    with torch.no_grad():
        wanted = model(ids)
    found = {}
    for kept in (-1.0, 100.0):
        monkeypatch.setattr("qkit.flows.uneven.KEPT_DB", kept)
        done = convert(model, "int8-dynamic", ids)
        found[kept] = compare([wanted], [done.module(ids)]).sqnr_db
        assert any("which is little" in note for note in done.notes) == (kept > 0)
        assert any("(qkv, out, head)" in note for note in done.notes) == (kept > 0)
    assert found[100.0] > found[-1.0]


class Outliers(nn.Module):
    """A linear layer with some great outputs, of which the next layer keeps little; and one with a
    relu behind, whose output stays one of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)
        for row in (3, 17):
            self.down.weight.data[row] *= 150
            self.up.weight.data[row] *= 150
        self.norm.weight.data[[3, 17]] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(x).relu() / 50).atan()))


def test_small_columns_keep_their_codes(tmp_path, monkeypatch, same_process):
    model, x = Outliers().eval(), torch.randn(50, 7, 24)
    with torch.no_grad():
        wanted = model(x)
    found = {}
    for level in (39.5, -1.0):
        monkeypatch.setattr("qkit.flows.uneven.ENOUGH_DB", level)
        done = convert(model, "int8-static", x, dialect="xnnpack")
        found[level] = compare([wanted], [done.module(x)]).sqnr_db
        assert any("1 outputs" in note and "(down)" in note for note in done.notes) == (level > 0)
    assert found[39.5] > found[-1.0] + 6
    assert convert(model, "int8-static", x, dialect="onnx").notes == ()  # whose kernels give floats
    monkeypatch.setattr("qkit.flows.uneven.ENOUGH_DB", 39.5)
    report = lower(model, "int8-static", tmp_path / "out", target="xnnpack", calib=x)
    assert report.kernels["FullyConnected qs8"] == 3
    assert report.error["sqnr_db"] > found[39.5] - 1
    # The codes of the weight are those of the model's own.
    assert {row.name: row.sqnr_db for row in report.layers}["down"] > 35


def test_columns_of_a_shared_weight_and_before_a_norm_stay(monkeypatch):
    monkeypatch.setattr("qkit.flows.uneven.ENOUGH_DB", 1000.0)
    monkeypatch.setattr("qkit.flows.uneven.WORTH_DB", -1000.0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    done = convert(model.eval(), "int8-static", torch.randn(9, 8), dialect="xnnpack")
    assert done.notes == ()


def test_rows_of_zeros_are_rows(ids):
    model = Decoder().eval()
    model.embed.weight.data[0] = 0
    ids[:, :3] = 0
    done = convert(model, "int8-dynamic", ids)
    with torch.no_grad():
        error = compare([model(ids)], [done.module(ids)])
    assert error.sqnr_db > 25
