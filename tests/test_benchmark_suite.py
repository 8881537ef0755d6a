"""The benchmarks as a whole: one command, a sample that is looked at, and the entry of pytest."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(p.stem for p in (ROOT / "benchmarks" / "results").glob("*.jsonl"))
# Measured before each file told its command; the next run of benchmarks/all.py replaces them.
OLD = {"layers", "streaming"}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def sample(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "all.py"), "--sample", *options]
    return subprocess.run(
        [*command, "--results", str(folder)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The lines of a sample of two scripts."""
    folder = tmp_path_factory.mktemp("results")
    done = sample(folder, "--only=layers,models")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"fine$", done.stdout, re.MULTILINE)) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["layers.jsonl", "models.jsonl"]
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def test_models_are_measured_beside_their_peers(
    measured: dict[str, list[dict[str, Any]]],
) -> None:
    head, *records = measured["models"]
    assert head["command"] == "python benchmarks/models.py --quick"
    assert {"machine", "versions", "commit"} <= head.keys()
    found = {(r["model"], r["contender"], r["scheme"]): r for r in records if r["kind"] == "model"}
    for model in ("digits CNN", "decoder 2x128"):
        base = found[model, "torch", "fp32"]
        assert (base["speedup"], base["size"], base["sqnr_db"]) == (1, 1, None)
        # Rounding to 8 bits leaves 30 dB and more of such models, to 4 bits 10.
        assert found[model, "qkit", "w8a16"]["sqnr_db"] > 30
        assert found[model, "qkit", "w8a16"]["size"] < 0.3
        assert found[model, "qkit", "w4a16-g32"]["sqnr_db"] > 10
        assert found[model, "torchao", "int8wo"]["sqnr_db"] > 30
        assert found[model, "optimum-quanto", "qint8"]["sqnr_db"] > 30
    assert found["digits CNN", "onnxruntime", "fp32"]["sqnr_db"] > 90
    assert found["digits CNN", "onnxruntime", "int8 static"]["sqnr_db"] > 15
    assert found["digits CNN", "qkit onnx", "int8-static"]["sqnr_db"] > 15
    assert all(("tokens_per_s" in r) == key[0].startswith("decoder") for key, r in found.items())


def test_a_peer_that_cannot_is_named(measured: dict[str, list[dict[str, Any]]]) -> None:
    absent = {r["name"]: r["why"] for r in measured["models"] if r.get("kind") == "absent"}
    assert absent["onnxruntime"] == "the model keeps a state between calls"


def test_a_peer_that_quantizes_another_model_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch
    from torch import nn

    peers = script("model_peers", monkeypatch)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64, 2))
    setting = peers.Setting(model, {}, None, lambda net: net, False, tmp_path, {})
    assert not setting.covers("theirs", model, (nn.Linear,))
    assert setting.absent == {"theirs": "it quantizes nn.Linear: 3% of what is multiplied"}
    assert setting.covers("theirs", model, (nn.Linear, nn.Conv2d))
    shared = nn.Sequential(model[2], model[2])
    assert peers.parameters(shared) == 130
    assert torch.is_tensor(model(torch.zeros(1, 8, 3, 3)))


def test_the_decoder_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    decoder = script("decoder", monkeypatch)
    model = decoder.Decoder(layers=2, width=32, heads=4, vocabulary=50, length=9).eval()
    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        step_by_step = decoder.generate(model, ids[:, :4], ids[:, 4:])
        at_once = model(ids, torch.arange(9))
        other = decoder.generate(model, ids[:, :4].flip(1), ids[:, 4:])
    # Sums of the same terms in another order: 2^10 roundings of fp32.
    assert torch.allclose(step_by_step, at_once, rtol=0, atol=2**-13 * float(at_once.abs().max()))
    assert not torch.allclose(other, at_once, rtol=0, atol=1e-3)


HEAD = {
    "command": "python benchmarks/layers.py",
    "machine": {"cpu": "one"},
    "versions": {"torch": "2.13.0"},
}
LINES = [
    {"layer": layer, "scheme": scheme, "ms": 1.5}
    for layer in ("digits 3x3", "minilm tokens")
    for scheme in ("w8a16", "w4a16-g32")
]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([HEAD, *LINES], None),
        ([HEAD, *LINES[:2]], "no line has layer 'minilm tokens'"),
        ([HEAD, *LINES[::2]], "no line has scheme 'w4a16-g32'"),
        ([{"command": "python benchmarks/layers.py"}, *LINES], "no line has the command, machine"),
        ([HEAD, *LINES, {"speedup": float("nan")}], "no JSON of finite numbers: NaN"),
        ([HEAD, *LINES, {"speedup": float("inf")}], "no JSON of finite numbers: Infinity"),
        ([HEAD, *LINES, {"ms": 0}], "line 6: ms is 0"),
        ([HEAD, *LINES, {"ms": {"p90": 2.0}}], "line 6: ms is {'p90': 2.0}"),
        ([HEAD, *LINES, {"ms": [1.0, 0.0]}], "line 6: ms is [1.0, 0.0]"),
        ([], "no line has"),
    ],
)
def test_what_is_missing_or_not_finite_is_found(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], told: str | None
) -> None:
    found = script("sane", monkeypatch).complaints("layers", "\n".join(map(json.dumps, lines)))
    assert bool(found) == (told is not None)
    assert told is None or any(told in each for each in found)


def test_a_line_that_is_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = "\n".join(map(json.dumps, [HEAD, *LINES]))[:-1]
    assert "no JSON" in script("sane", monkeypatch).complaints("layers", cut)[0]


def test_a_script_that_fails_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = script("all", monkeypatch)
    (tmp_path / "layers.jsonl").write_text("before")
    (wrong,) = everything.measure("layers", (["--no-such-option"],), tmp_path)
    assert wrong.startswith("exit 2: ")
    assert "--no-such-option" in wrong
    assert (tmp_path / "layers.jsonl").read_text() == "before"
    with pytest.raises(SystemExit, match="no such benchmark: nothing"):
        list(everything.chosen("layers,nothing", sample=True))


def test_every_script_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = script("all", monkeypatch).PLANS
    texts = {p.stem: p.read_text() for p in (ROOT / "benchmarks").glob("*.py")}
    prints = {
        name
        for name, text in texts.items()
        if "argparse" in text and re.search(r"from (lines|cells) import", text)
    }
    assert plans.keys() == prints
    assert plans.keys() == script("sane", monkeypatch).EXPECTED.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_committed_with_what_made_them(name: str) -> None:
    text = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text()

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    records = [json.loads(line, parse_constant=refused) for line in text.splitlines()]
    told = [r for r in records if r.get("machine", {}).get("cpu")]
    assert told
    if name not in OLD:
        assert all(f"{name}.py" in r["command"] for r in told)
        assert all(r["versions"]["torch"] for r in told)


def test_every_table_and_every_file_of_results_is_in_the_readme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = script("tables", monkeypatch)
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", readme)) == tables.TABLES.keys()
    used = set(re.findall(r'read\("(\w+)"\)', (ROOT / "benchmarks" / "tables.py").read_text()))
    # docs/pt2e.md is made of one, and one is told of in words.
    assert set(RESULTS) <= used | {"pt2e", "streaming"}


def test_pytest_alone_does_not_collect_the_suite_and_by_name_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q"]
    alone = subprocess.run(
        [*command, "benchmarks", "--collect-only"], cwd=ROOT, capture_output=True, text=True
    )
    assert "no tests collected" in alone.stdout, alone.stdout
    # A process that shares tests with others would not measure: this one does not.
    alone_env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    out = tmp_path / "suite.json"
    names = {"test_linear[16-torch]", "test_linear[16-w8a16]"}
    only = [f"benchmarks/suite.py::{name}" for name in names]
    done = subprocess.run(
        [*command, *only, "--benchmark-max-time=0.01", f"--benchmark-json={out}"],
        cwd=ROOT,
        env=alone_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    made = json.loads(out.read_text())
    assert {each["name"] for each in made["benchmarks"]} == names
    assert made["machine_info"]["qkit"]["machine"]["cpu"]
