"""The report tells what was measured; its sizes are those on disk."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import qkit
from qkit import native
from qkit.errors import BudgetError, CoverageError
from qkit.flows import Request, evaluate, quantize_file
from qkit.flows.save import check_budgets
from qkit.report import Report
from qkit.report.timing import Latency
from qkit.targets.artifact import WEIGHTS

KEYS = {
    "scheme": str,
    "target": str,
    "layers": list,
    "coverage": dict,
    "size_bytes": dict,
    "error": dict,
    "latency_ms": dict,
    "kernels": dict,
    "verification": dict,
    "peak_rss_bytes": int,
    "seconds": float,
    "versions": dict,
    "machine": dict,
}


@pytest.fixture
def run(tmp_path, same_process):
    """(model, what is saved of it, options) -> the report, with its artifact in ``out``."""

    def run(model: object, **options: object) -> Report:
        torch.save(model, tmp_path / "net.pt")
        return quantize_file(
            Request(str(tmp_path / "net.pt"), output=str(tmp_path / "out"), **options)
        )

    return run


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym", "bf16"])
@pytest.mark.parametrize("state", [False, True], ids=["module", "state dict"])
def test_the_file_is_the_report(state, scheme, run, cnn, tmp_path):
    report = run(cnn.state_dict() if state else cnn, scheme=scheme)
    text = (tmp_path / "out" / "report.json").read_text()
    assert text == report.dumps()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert {key: type(data[key]) for key in KEYS} == KEYS
    assert data["size_bytes"].keys() >= {"source", "artifact", "ratio"}
    assert data["error"].keys() >= {"sqnr_db", "cosine", "max_abs"}
    assert data["verification"].keys() >= {"status", "level", "runtime", "fresh_process"}
    assert data["verification"]["status"] == "verified"
    assert data["versions"].keys() >= {"python", "qkit", "torch"}
    assert data["peak_rss_bytes"] > 1e7
    assert data["seconds"] > 0
    if state:
        assert data["latency_ms"] == data["kernels"] == {}
    else:
        for side in ("float", "quantized"):
            times = data["latency_ms"][side]
            assert 0 < times["p10"] <= times["median"] <= times["p90"]
        assert data["latency_ms"].keys() >= {"speedup", "threads"}


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "fp16"])
def test_sizes_are_those_on_disk(scheme, run, cnn, tmp_path):
    size = run(cnn, scheme=scheme).size_bytes
    assert size["source"] == (tmp_path / "net.pt").stat().st_size
    assert size["artifact"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert size["folder"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert size["ratio"] == round(size["artifact"] / size["source"], 4)


def test_the_source_is_named_without_its_folder(run, cnn, tmp_path):
    source = run(cnn).source
    assert (source["path"], source["kind"]) == ("net.pt", "pickle-zip")
    assert source["files"]["net.pt"]["bytes"] == (tmp_path / "net.pt").stat().st_size
    assert str(tmp_path) not in (tmp_path / "out" / "qkit.json").read_text()


def test_kernels_are_counted(cnn):
    x = torch.randn(2, 3, 8, 8)
    _, report = qkit.quantize(cnn, "w8a16", inputs=x, latency=False)
    by_operator = {name.split("[")[0]: count for name, count in report.kernels.items()}
    assert by_operator == {"qkit::convolution": 2, "qkit::linear": 1}
    ways = {name.partition("[")[2].rstrip("]") for name in report.kernels}
    assert ways <= {"reference", native.isa()}


@pytest.mark.parametrize(("quantized", "slow"), [(2.0, True), (1.0, True), (0.5, False)])
@pytest.mark.parametrize("scheme", ["w8a16", "bf16"])
def test_what_is_not_faster_says_so_and_why(scheme, quantized, slow, cnn, monkeypatch):
    times = {"float": Latency(1.0, 0.9, 1.1, 5), "quantized": Latency(quantized, 0.4, 2.2, 5)}
    monkeypatch.setattr(evaluate, "measure", lambda functions, seconds: times)
    _, report = qkit.quantize(cnn, scheme, inputs=torch.randn(2, 3, 8, 8))
    remarks = [remark for remark in report.remarks if "not faster" in remark]
    assert len(remarks) == slow
    assert report.latency_ms["speedup"] == 1 / quantized
    assert report.latency_ms["threads"] == torch.get_num_threads()
    if slow:
        assert f"{1 / quantized:.2f}x" in remarks[0]
        unpacked = "unpack" if native.library() is not None else "reference operators"
        assert (unpacked if scheme == "w8a16" else "than float32") in remarks[0]


class Idle(nn.Module):
    """One layer that runs, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.idle = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("model", "scheme", "reason"),
    [
        (nn.Linear(5, 3).half(), "fp16", "fp16 is computed here no faster than float16"),
        (Idle(), "w8a16", "no quantized layer ran"),
    ],
)
def test_the_reason_is_that_of_the_model(model, scheme, reason, monkeypatch):
    same = dict.fromkeys(("float", "quantized"), Latency(1.0, 0.9, 1.1, 5))
    monkeypatch.setattr(evaluate, "measure", lambda functions, seconds: same)
    x = torch.randn(2, 5, dtype=next(model.parameters()).dtype)
    _, report = qkit.quantize(model, scheme, inputs=x)
    assert [reason in remark for remark in report.remarks if "not faster" in remark] == [True]


def test_both_models_are_timed_on_the_same_inputs(cnn, monkeypatch):
    seen = []

    def measure(functions, seconds):
        for function in functions.values():
            function()
        return {name: Latency(1.0, 1.0, 1.0, 5) for name in functions}

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(
        evaluate,
        "run",
        lambda model, inputs, run=evaluate.run: seen.append(inputs) or run(model, inputs),
    )
    qkit.quantize(cnn, "w8a16", inputs=torch.randn(2, 3, 8, 8))
    assert len(seen) == 4  # once for the error and once for the time, both models
    assert all(torch.equal(i.args[0], seen[0].args[0]) for i in seen)


def test_a_large_error_is_remarked(cnn):
    x = torch.randn(2, 3, 8, 8)
    assert any(
        "error is large" in remark
        for remark in qkit.quantize(cnn, "w2a16", inputs=x, latency=False)[1].remarks
    )
    assert not qkit.quantize(cnn, "w8a16", inputs=x, latency=False)[1].remarks


def test_an_output_that_is_not_finite_is_refused():
    class Log(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).log()

    model = nn.Sequential(nn.Linear(4, 4), Log(4, 4))
    with pytest.raises(Exception, match="output is not finite") as caught:
        qkit.quantize(model, "w8a16", inputs=torch.randn(8, 4))
    assert caught.value.exit_code == 3


def test_exact_results_are_null_not_infinite():
    """Weights that int8 holds exactly have no noise."""
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, 1, -2, 3], [-127, 0, 64, 5]]))
    _, report = qkit.quantize(layer, "w8a16", inputs=torch.ones(1, 4), latency=False)
    assert report.error["sqnr_db"] is None
    assert report.error["max_abs"] == 0
    assert report.layers[0].sqnr_db is None
    assert json.loads(report.dumps())["error"]["sqnr_db"] is None


def test_figures_of_the_users_own(cnn, tmp_path, same_process):
    torch.save(cnn, tmp_path / "net.pt")
    given = []
    report = quantize_file(
        Request(str(tmp_path / "net.pt"), output=str(tmp_path / "out")),
        metrics=lambda *models: given.extend(models) or {"top1": {"float": 0.9}},
    )
    assert report.metrics == {"top1": {"float": 0.9}}
    assert [any("Q" in type(m).__name__ for m in model.modules()) for model in given] == [
        False,
        True,
    ]


class PredictsLength(nn.Module):
    """One row, or two if what it computes is below a limit."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return x[: 1 + int(self.fc(x[:1]).item() < self.limit)]


def test_outputs_whose_sizes_differ_are_not_compared_and_it_is_said():
    """8 bits of 0.3 and 1 are not 0.3: one model is made to give a row more than the other."""
    net, x = PredictsLength(), torch.ones(2, 2)
    net.fc.weight.data = torch.tensor([[0.3, 1.0]])
    quantized = float(qkit.quantize(net.fc, inputs=x, latency=False)[0](x)[0, 0])
    exact = float(net.fc(x).detach()[0, 0])
    assert quantized != exact
    net.limit = (quantized + exact) / 2
    _, report = qkit.quantize(net, inputs=x, latency=False)
    assert report.error["level"] == "weights"
    assert report.error["sqnr_db"] == report.layers[0].sqnr_db
    assert [r for r in report.remarks if "other sizes" in r]


# Budgets


def measured(fraction: float, sqnr: float | None) -> Report:
    return Report("s", "l", "torch", coverage={"fraction": fraction}, error={"sqnr_db": sqnr})


@pytest.mark.parametrize(
    ("report", "limits", "error"),
    [
        (measured(0.5, 20.0), {"min_coverage": 0.5, "min_sqnr": 20.0}, None),
        (measured(0.5, 20.0), {"min_coverage": 0.51}, CoverageError),
        (measured(0.5, 20.0), {"min_sqnr": 20.1}, BudgetError),
        (measured(0.5, None), {"min_sqnr": 200.0}, None),
        (measured(0.1, 1.0), {"min_coverage": 0.5, "min_sqnr": 20.0}, CoverageError),
        (measured(0.0, -5.0), {}, None),
    ],
)
def test_budgets(report, limits, error):
    if error is None:
        check_budgets(report, **limits)
    else:
        with pytest.raises(error):
            check_budgets(report, **limits)


def test_a_missed_budget_writes_nothing(run, cnn, tmp_path):
    for options, error in ({"min_sqnr": 99.0}, BudgetError), ({"min_coverage": 1.0}, CoverageError):
        with pytest.raises(error):
            run(cnn, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
