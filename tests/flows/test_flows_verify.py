"""Verification: a fresh process loads what lies on disk and must give the same numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import InputError, RequestError, UsageError, VerificationError
from qkit.flows import verify as verify_flow
from qkit.flows.check import MAX_CHECK_VALUES, expected, inputs_of, model_check
from qkit.flows.verify import BOUNDS
from qkit.models import Inputs
from qkit.targets.artifact import read_artifact

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))

def other():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

def broken():
    raise ZeroDivisionError("no model today")

def needs():
    from qkit.errors import MissingExtraError
    raise MissingExtraError("timm", "timm", needed_for="this model")

def dies():
    import os
    os._exit(9)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out``, a model with its program, ``layers``, one without, and ``net_of_verify.py``."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "net_of_verify.py").write_text(FACTORY)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    x = torch.randn(5, 12)
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, folder / "out", report=report, inputs=x)
    qkit.save(qmodel, folder / "layers")
    return folder


@pytest.fixture
def job(monkeypatch):
    """The jobs that were given to fresh processes."""
    jobs = []
    original = sys.modules[verify_flow.__module__].fresh_process

    def spy(job, artifact):
        jobs.append(job)
        return original(job, artifact)

    monkeypatch.setattr(sys.modules[verify_flow.__module__], "fresh_process", spy)
    return jobs


def test_a_model_with_its_program(folder):
    result = qkit.verify(folder / "out")
    assert result["status"] == "verified"
    assert result["level"] == "model"
    assert result["fresh_process"] is True
    assert result["bit_identical"] is True
    assert result["max_rel_error"] == 0
    assert result["runtime"] == f"torch {torch.__version__}, eager"
    assert [check["way"] for check in result["checks"]] == ["program"]
    assert result["peak_rss_bytes"] > 1e7
    assert 0 < result["program_load_seconds"] <= result["program_first_output_seconds"]
    if sys.platform == "linux":
        assert result["program_first_output_bytes"].keys() == {"private", "mapped"}


def test_layers_one_by_one(folder):
    result = qkit.verify(str(folder / "layers"))
    assert (result["status"], result["level"]) == ("verified", "layers")
    assert [check["way"] for check in result["checks"]] == ["layers"]


def test_the_process_is_really_another_one(folder, monkeypatch):
    """What this process has loaded or patched does not help."""
    from qkit import ops

    monkeypatch.setattr(ops, "linear", None)
    assert qkit.verify(folder / "layers")["bit_identical"]


def test_the_working_directory_shadows_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "qkit.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    if sys.version_info >= (3, 11):
        assert qkit.verify(folder / "layers")["status"] == "verified"


def test_with_an_architecture(folder, monkeypatch, job):
    monkeypatch.chdir(folder)
    result = qkit.verify("out", model="net_of_verify:build")
    assert [check["way"] for check in result["checks"]] == ["module", "program"]
    assert os.path.isabs(job[0]["artifact"])
    result = qkit.verify("out", model=f"{folder}/net_of_verify.py:build")
    assert result["bit_identical"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere:build", UsageError, "nowhere"),
        ("net_of_verify:biuld", UsageError, "biuld"),
        ("net_of_verify:other", VerificationError, "not the one that was quantized"),
        ("net_of_verify:broken", UsageError, "no model today"),
        ("net_of_verify:needs", RequestError, r"pip install 'qkit-torch\[timm\]'"),
        ("net_of_verify:dies", VerificationError, "exit 9"),
    ],
)
def test_architectures_that_do_not_help(name, error, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message) as caught:
        qkit.verify("out", model=name)
    assert type(caught.value) is error
    assert "Traceback" not in str(caught.value)


def test_with_the_source_file(folder, tmp_path):
    torch.save(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)), tmp_path / "net.pt")
    result = qkit.verify(folder / "out", source=tmp_path / "net.pt")
    assert [check["way"] for check in result["checks"]] == ["module", "program"]
    (tmp_path / "net.pt").write_bytes(b"PK")
    with pytest.raises(VerificationError, match="truncated or corrupt"):
        qkit.verify(folder / "out", source=tmp_path / "net.pt")


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(InputError, match="not a qkit artifact"):
        qkit.verify(tmp_path)


# What is compared


def judge(monkeypatch, folder: Path, change) -> dict:
    """Verify with the outputs of the fresh process changed."""
    artifact = read_artifact(folder / "out")
    outputs = {
        key.replace("module.", "program."): change(value.clone())
        for key, value in expected(artifact).items()
    }
    module = sys.modules[verify_flow.__module__]
    monkeypatch.setattr(module, "fresh_process", lambda job, artifact: (outputs, {}))
    return qkit.verify(folder / "out")


def test_a_difference_below_the_bound_is_told(folder, monkeypatch):
    result = judge(monkeypatch, folder, lambda t: t * (1 + BOUNDS[torch.float32] / 2))
    assert result["bit_identical"] is False
    assert 0 < result["max_rel_error"] <= BOUNDS[torch.float32]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * (1 + BOUNDS[torch.float32] * 2),
        lambda t: t.index_fill(0, torch.tensor(0), float("nan")),
        lambda t: t.index_fill(0, torch.tensor(0), float("inf")),
        lambda t: t.half(),
        lambda t: t[:-1],
        lambda t: t.T,
        lambda t: t.flip(0),
        lambda t: t * 0,
    ],
    ids=["error", "nan", "inf", "type", "rows", "shape", "order", "zero"],
)
def test_any_other_output_is_an_error(change, folder, monkeypatch):
    with pytest.raises(VerificationError) as caught:
        judge(monkeypatch, folder, change)
    assert caught.value.exit_code == 4
    assert str(folder / "out") in str(caught.value)


# The check file


def test_the_check_file_holds_the_inputs(folder):
    artifact = read_artifact(folder / "out")
    inputs = inputs_of(artifact)
    assert [t.shape for t in inputs.args] == [(5, 12)]
    assert expected(artifact)["module.0"].shape == (5, 4)


def test_large_inputs_are_cut_to_their_first_samples():
    rows = 64
    x = torch.randn(rows, MAX_CHECK_VALUES // 16)
    check = model_check(nn.Identity(), Inputs((x,), {}, "test"))
    kept = check["input.args.0"]
    assert 2 <= len(kept) < rows
    assert kept.numel() <= MAX_CHECK_VALUES
    assert torch.equal(kept, x[: len(kept)])
    assert torch.equal(check["module.0"], kept)


def test_arguments_by_name_and_several_outputs(tmp_path, same_process):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, *, gate: torch.Tensor) -> dict[str, object]:
            return {"a": self.a(x), "more": (self.b(gate), x.sum())}

    inputs = {"x": torch.randn(2, 6), "gate": torch.randn(2, 6)}
    qmodel, report = qkit.quantize(Two().eval(), "w8a16", inputs=inputs, latency=False)
    artifact = qkit.save(qmodel, tmp_path / "out", report=report, inputs=inputs)
    assert sorted(expected(artifact)) == ["module.0", "module.1", "module.2"]
    assert inputs_of(artifact).kwargs.keys() == {"x", "gate"}
    assert [c["way"] for c in report.verification["checks"]] == ["program"]
