"""Rows that differ in size, before kernels with one range for all of them."""

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
    for level in (39.5, -1.0):
        monkeypatch.setattr("qkit.flows.uneven.ENOUGH_DB", level)
        done = convert(model, "int8-dynamic", ids)
        found[level] = compare([wanted], [done.module(ids)]).sqnr_db
        assert len(done.chosen) == 3
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


def test_rows_of_zeros_are_rows(ids):
    model = Decoder().eval()
    model.embed.weight.data[0] = 0
    ids[:, :3] = 0
    done = convert(model, "int8-dynamic", ids)
    with torch.no_grad():
        error = compare([model(ids)], [done.module(ids)])
    assert error.sqnr_db > 25
