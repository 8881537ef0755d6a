"""Reports as files: which, from what, refused when, and what is measured for them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from pages import HOSTILE, Page
from torch import nn

import qkit
import qkit.flows
from qkit.errors import MissingExtraError, OutputError, UsageError
from qkit.flows import Request, documents, layer_times, quantize_file
from qkit.flows.compress import CompressRequest, compress, compress_file
from qkit.flows.documents import check_reports, document_of
from qkit.flows.layer_times import layer_times as time_layers
from qkit.models import Inputs
from qkit.report import Report


def hostile() -> nn.Module:
    """A model one of whose layers has a name that is a script."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU())
    model.add_module(HOSTILE.replace(".", ""), nn.Linear(40, 6))
    return model.eval()


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return qkit.quantize(hostile(), "w4a16-g32", inputs=torch.randn(4, 24), details=True)[1]


def test_what_is_measured_for_a_document(report):
    rows = {row.name: row for row in report.layers}
    names = [each["name"] for each in report.details["histograms"]]
    assert names == sorted(rows, key=lambda name: rows[name].sqnr_db)
    for each in report.details["histograms"]:
        assert each["levels"] == tuple(range(-8, 8))
        assert sum(each["before"]) * each["width"] == pytest.approx(1, abs=1e-4)
    times = {row["name"]: row for row in report.details["times"]}
    assert times.keys() == rows.keys()
    for name, (outputs, inputs) in (("0", (40, 24)), (HOSTILE.replace(".", ""), (6, 40))):
        row = times[name]
        assert row["multiply_adds"] == 4 * outputs * inputs
        assert row["bytes"] > 4 * 4 * (inputs + outputs) + outputs * inputs / 2
        assert 0 < row["quantized_ms"] < report.latency_ms["quantized"]["p90"] * 5
        assert row["float_ms"] > 0
        assert row["roofline"] > 0
    plain = qkit.quantize(hostile(), "w4a16-g32", inputs=torch.randn(4, 24))[1]
    assert plain.details == {}
    again = Report.from_json(json.loads(report.dumps()))
    assert document_of(again).dumps() == document_of(report).dumps()


def test_opened_and_shared_layers_are_timed(monkeypatch):
    monkeypatch.setattr(layer_times, "SECONDS", 0.0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 8, batch_first=True)
            self.head = nn.Linear(8, 50)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.words(x))[0])

    model = Net().eval()
    ids = torch.randint(0, 50, (2, 5))
    qmodel, report = qkit.quantize(model, "w8a16", inputs=ids, latency=False, details=True)
    assert "times" not in report.details
    times = {row["name"]: row for row in time_layers(model, qmodel, Inputs((ids,), {}, "ids"))}
    assert times["lstm.weight_hh_l0"]["float_ms"] is None  # its part of torch's one loop
    assert times["head"]["float_ms"] > 0
    assert times["words"]["multiply_adds"] == 0
    # Of the table the rows that were looked up, with their scales, and what comes in and out.
    assert times["words"]["bytes"] == pytest.approx(10 * (16 + 4 + 8 + 64), rel=0.05)


def test_suffixes_say_what_is_written(report, tmp_path):
    paths = [tmp_path / "new" / f"out{suffix}" for suffix in (".html", ".md", ".json")]
    qkit.write_report(report, *paths, command="qkit quantize x")
    page, markdown, data = (path.read_text() for path in paths)
    assert page.startswith("<!doctype html>")
    assert any(HOSTILE.replace(".", "") in row for table in Page(page).tables for row in table)
    assert markdown.startswith("# w4a16-g32 for torch\n")
    assert json.loads(data) == json.loads(document_of(report, "qkit quantize x").dumps())
    assert "qkit quantize x" in page
    assert "qkit quantize x" in markdown
    for path in paths:
        with pytest.raises(UsageError, match="exists"):
            qkit.write_report(report, path)
        qkit.write_report(report, path, overwrite=True)
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match="another kind of file"):
        check_reports(tmp_path / "notes.md", overwrite=True)


def test_refused_before_any_work(report, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"out\.pdf.*\.html, \.md, \.json"):
        check_reports("out.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        check_reports(tmp_path / "file" / "out.md")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qkit-torch\[report\]'") as error:
        check_reports(tmp_path / "out.html")
    assert error.value.exit_code == 7
    check_reports(tmp_path / "out.md", tmp_path / "out.json")  # which need nothing
    assert not list(tmp_path.glob("out*"))


def test_the_bytes_are_those_on_disk(tmp_path, same_process):
    torch.save(hostile(), tmp_path / "net.pt")
    out = tmp_path / "out"
    report = quantize_file(Request(str(tmp_path / "net.pt"), output=str(out), input="4x24"))
    files, layers = documents._bytes(report.artifact)
    assert files == {path.name: path.stat().st_size for path in out.iterdir()}
    assert layers.keys() == {row.name for row in report.layers}
    assert 0 <= files["model.safetensors"] - sum(layers.values()) < 2000  # its head
    assert documents._bytes(str(tmp_path / "gone")) == documents._bytes(None) == ({}, {})


def test_the_ledger_of_a_recipe(tmp_path, same_process):
    torch.save(hostile(), tmp_path / "net.pt")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({
        "steps": [{"factorize": {"rank": 4}}, {"quantize": {"scheme": "w8a16"}}], "input": "4x24",
        "format": "coded",
    }))  # fmt: skip
    out = tmp_path / "net.qkit"
    ledger = compress_file(CompressRequest(str(recipe), str(tmp_path / "net.pt"), str(out)))
    shown = document_of(ledger, "qkit compress")
    table = next(p for p in shown.sections if p.name == "ledger").blocks[0]
    assert [row[0] for row in table.rows] == ["float", "1 factorize", "2 quantize"]
    assert [row[3] for row in table.rows] == [row.bytes for row in ledger.rows]
    assert shown.verdict[0].startswith(f"{ledger.rows[0].bytes / out.stat().st_size:.2f} times")
    assert shown.verdict[-1].startswith("Verified in a fresh process")
    assert ledger.machine["cores"]
    assert ledger.versions["qkit"]
    qkit.write_report(ledger, tmp_path / "out.html", tmp_path / "out.md")
    assert "2 quantize" in (tmp_path / "out.html").read_text()


def test_a_ledger_without_inputs_says_what_is_not_known():
    _, ledger = compress(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {"steps": ["quantize"]})
    ledger.rows[:] = [r.__class__(**vars(r) | {"latency_ms": None}) for r in ledger.rows]
    said = document_of(ledger).verdict
    assert said[1] == "Speed was not measured."
    assert said[2].startswith("The loss was not measured")
    assert said[3].startswith("Not verified")


@pytest.mark.parametrize("scheme", ["int8-static", "w4a16-g32"])
def test_models_for_a_runtime(scheme):
    x = torch.randn(32, 24)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    report = qkit.flows.lower(model, scheme, None, calib=x, details=True, calib_report=True)
    drawn = report.details["histograms"]
    assert [each["name"] for each in drawn] == sorted(
        (row.name for row in report.layers),
        key=lambda name: next(row.sqnr_db for row in report.layers if row.name == name),
    )
    assert all("int" in each["what"] for each in drawn)
    shown = document_of(report)
    seen = report.calibration.get("activations", [])
    assert bool(seen) == (scheme == "int8-static")
    for row in seen:
        assert sum(row["distribution"]["after"]) * row["distribution"]["width"] == pytest.approx(
            1, abs=1e-4
        )
    assert ("activations" in [part.name for part in shown.sections]) == bool(seen)
