"""Recipes: refused before any work, followed step by step, gone on with, and booked in a ledger."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import names
from command import qkit as command
from torch import nn

import qkit
from qkit.errors import InputError, MissingExtraError, UsageError
from qkit.flows.compress import CompressRequest, compress_file, read_recipe, steps
from qkit.flows.train import labelled
from qkit.targets.artifact import read_artifact


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()


RECIPE = """
steps:
  - factorize: {rank: 12, ignore: ["0", "4"]}
  - prune: {amount: 0.3, round_to: 1}
  - train: {epochs: 1, lr: 0.01}
  - cluster: {entries: 8, train: {epochs: 1}}
data: train.npz
val: train.npz
calib: real.npz
format: coded
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(make(), tmp_path / "net.pt")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 20)).astype("f4")
    np.savez(tmp_path / "train.npz", input=x, labels=x[:, :4].argmax(1))
    np.savez(tmp_path / "real.npz", input=x[:32])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def rows_of(ledger: Any) -> list[dict[str, Any]]:
    """What does not depend on the time."""
    timed = ("latency_ms", "seconds")
    return [{k: v for k, v in vars(row).items() if k not in timed} for row in ledger.rows]


@pytest.mark.usefixtures("same_process")
def test_a_recipe_is_followed_and_booked(folder):
    ledger = compress_file(CompressRequest("recipe.yaml", "net.pt", "net.qkit"))
    assert [row.step for row in ledger.rows] == ["float", "factorize", "prune", "train", "cluster"]
    before, factorized, pruned, trained, clustered = ledger.rows
    assert before.parameters == sum(p.numel() for p in make().parameters())
    assert before.parameters > factorized.parameters > pruned.parameters == trained.parameters
    assert before.multiply_adds > factorized.multiply_adds > pruned.multiply_adds
    assert before.bytes > factorized.bytes > pruned.bytes > clustered.bytes
    assert clustered.bytes == (folder / "net.qkit").stat().st_size
    assert all({"loss", "accuracy"} <= row.metrics.keys() for row in ledger.rows)
    assert trained.metrics["loss"] < pruned.metrics["loss"]
    assert ledger.verification["status"] == "verified"
    assert json.loads((folder / "net.ledger.json").read_text())["rows"][4] == vars(clustered)
    again = qkit.load("net.qkit", into=make)
    assert sum(p.numel() for p in again.parameters()) < before.parameters
    recipe = read_artifact("net.qkit").meta["recipe"]
    assert read_recipe(recipe) == read_recipe("recipe.yaml")  # resolved, and a recipe again
    assert names(folder) == [
        "net.ledger.json", "net.pt", "net.qkit", "real.npz", "recipe.yaml", "train.npz",
    ]  # fmt: skip


@pytest.mark.usefixtures("same_process")
def test_a_run_goes_on_where_it_was_stopped(folder):
    whole = compress_file(CompressRequest("recipe.yaml", "net.pt", "whole.qkit", work="w1"))
    assert names(folder / "w1") == ["01-factorize", "02-prune", "03-train", "ledger.json"]
    asked = CompressRequest("recipe.yaml", "net.pt", "parts.qkit", work="w2")

    def stop(*given: Any) -> nn.Module:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(steps.STEPS, "train", replace(steps.STEPS["train"], run=stop))
        with pytest.raises(KeyboardInterrupt):
            compress_file(asked)
    assert names(folder / "w2") == ["01-factorize", "02-prune", "ledger.json"]
    assert not (folder / "parts.qkit").exists()
    said: list[str] = []
    parts = compress_file(asked, told=said.append)
    assert "going on behind step 2, prune" in said
    assert not any(text.startswith(("1/4", "2/4")) for text in said)
    assert (folder / "parts.qkit").read_bytes() == (folder / "whole.qkit").read_bytes()
    assert rows_of(parts) == rows_of(whole)
    # Another recipe, or a damaged folder, goes on only behind what is the same.
    other = RECIPE.replace("amount: 0.3", "amount: 0.4")
    (folder / "recipe.yaml").write_text(other)
    said.clear()
    compress_file(replace(asked, output="other.qkit"), told=said.append)
    assert "going on behind step 1, factorize" in said
    (folder / "w2" / "02-prune" / "model.safetensors").write_bytes(b"")
    (folder / "w2" / "03-train" / "qkit.json").write_bytes(b"")
    said.clear()
    compress_file(replace(asked, output="again.qkit"), told=said.append)
    assert "going on behind step 1, factorize" in said


@pytest.mark.usefixtures("same_process")
def test_a_folder_and_the_library_agree(folder):
    recipe = {"steps": [{"prune": {"amount": 0.4}}, {"quantize": {"scheme": "w8a16"}}]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    ledger = compress_file(CompressRequest("recipe.json", "net.pt"))
    assert ledger.artifact == "net-compressed"
    assert json.loads((folder / "net-compressed" / "ledger.json").read_text())["rows"]
    x = torch.randn(3, 20)
    model = make()
    before = model.state_dict()["0.weight"].clone()
    small, same = qkit.compress(model, recipe, inputs=torch.randn(2, 20))
    assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        assert torch.equal(qkit.load("net-compressed", into=make)(x), small(x))
    for a, b in zip(ledger.rows, same.rows, strict=True):
        assert (a.step, a.parameters, a.nonzeros) == (b.step, b.parameters, b.nonzeros)


def test_the_library_takes_data(folder):
    x = torch.randn(64, 20)
    data = labelled(x, x[:, :4].argmax(1))
    recipe = {"steps": [{"train": {"epochs": 2, "lr": 0.01}}, {"cluster": {"entries": 4}}]}
    small, ledger = qkit.compress(make(), recipe, calib=x, data=data, val=data)
    assert ledger.rows[1].metrics["loss"] < ledger.rows[0].metrics["loss"]
    assert len(small[0].weight.unique()) <= 4
    with pytest.raises(UsageError, match="no data are named"):
        qkit.compress(make(), recipe, inputs=x)
    wrong = labelled(x, torch.randn(64))
    with pytest.raises(InputError):
        qkit.compress(make(), recipe, inputs=x, data=wrong)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"prune": {"ignore": ["5"]}}, "matches no module"),
        ({"factorize": {"rank": 4, "ignore": ["re:x"]}}, "matches no module"),
        ({"cluster": {"ignore": ["LSTM"]}}, "matches no module"),
        ({"sparsify": {"amount": {"5": 0.5}}}, "matches no module"),
        ({"sparsify": {"amount": 0.999}}, r"without any weight.*4\.weight"),
        ({"distill": {"match": ["1=7"]}}, "no such module"),
        ({"prune": {"train": {"teacher": 0.5, "match": ["x=1"]}}}, "no such module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_training(step, text):
    x, said = torch.randn(64, 20), list[str]()
    data = labelled(x, x[:, :4].argmax(1))
    recipe = {"steps": [{"train": {"epochs": 1}}, step]}
    with pytest.raises(UsageError, match=text):
        qkit.compress(make(), recipe, inputs=x, data=data, told=said.append)
    assert not said


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_sparse_stays_so(method):
    model, x = make(), torch.randn(64, 20)
    data = labelled(x, x[:, :4].argmax(1))
    sparsify = {"amount": 0.6, "method": method, "ignore": ["4"]}
    steps_ = [{"sparsify": sparsify}, {"train": {"epochs": 1, "lr": 0.01}}, {"cluster": {}}]
    small, ledger = qkit.compress(model, {"steps": steps_}, calib=x, data=data)
    whole, sparse, trained, clustered = (row.nonzeros for row in ledger.rows)
    weights = 20 * 64 + 64 * 64
    # A share of each row, at the coarsest: off by at most half a weight in each of 128 rows.
    assert sparse == pytest.approx(whole - 0.6 * weights, abs=64)
    assert clustered <= trained == sparse
    assert float((small[2].weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
    with pytest.raises(UsageError, match="learns from real inputs"):
        read_recipe({"steps": [{"sparsify": {"method": "sparsegpt"}}]})


WRONG = [
    ({}, "has steps"),
    ({"steps": []}, "has steps"),
    ({"steps": ["prune"], "more": 1}, "unknown field"),
    ({"steps": ["pruen"]}, "unknown step.*prune"),
    ({"steps": [{"prune": {}, "train": {}}]}, "a name with its options"),
    ({"steps": [{"prune": 3}]}, "names and values"),
    ({"steps": [{"prune": {"share": 0.5}}]}, "unknown option of 'prune'.*amount"),
    ({"steps": [{"prune": {"amount": 1.0}}]}, "above 0 and below 1"),
    ({"steps": [{"prune": {"amount": "half"}}]}, "another type"),
    ({"steps": [{"prune": {"unit": "mac"}}]}, "unknown unit"),
    ({"steps": [{"prune": {"ignore": "0"}}]}, "list of names"),
    ({"steps": [{"factorize": {"amount": 1.0}}]}, "share of parameters to remove"),
    ({"steps": [{"factorize": {"amount": "x"}}]}, "another type"),
    ({"steps": [{"cluster": {"entries": 1}}]}, "2 to 256"),
    ({"steps": [{"cluster": {"train": {"epoch": 1}}}], "data": "x.npz"}, "unknown option of train"),
    ({"steps": [{"quantize": {"scheme": "w9a9"}}]}, "unknown scheme"),
    ({"steps": [{"quantize": {"algorithm": "gptq"}}]}, "learns from real inputs"),
    ({"steps": [{"sparsify": {"amount": 1.0}}]}, "above 0 and below 1"),
    ({"steps": [{"sparsify": {"amount": "4:2"}}]}, "not a pattern"),
    ({"steps": [{"sparsify": {"amount": {"0": 1.0}}}]}, "above 0 and below 1"),
    ({"steps": [{"sparsify": {"amount": {0: 0.5}}}]}, "by their names"),
    ({"steps": [{"sparsify": {"amount": [0.5]}}]}, "another type"),
    ({"steps": [{"cluster": {"train": {"teacher": 2}}}], "data": "x.npz"}, "0 to 1"),
    ({"steps": [{"cluster": {"train": {"teacher": "x"}}}], "data": "x.npz"}, "another type"),
    ({"steps": [{"cluster": {"train": {"temperature": 2}}}], "data": "x.npz"}, "with a teacher"),
    ({"steps": [{"prune": {"train": {"teacher": 1, "match": "1"}}}], "data": "x.npz"}, "list of"),
    ({"steps": ["prune", {"distill": {"teacher": None}}], "data": "x.npz"}, "another type"),
    ({"steps": [{"sparsify": {"method": "least"}}]}, "unknown method"),
    ({"steps": ["cluster", "sparsify"]}, "cannot come after 'cluster'"),
    ({"steps": ["train"]}, "no data are named"),
    ({"steps": [{"train": {"epochs": 0}}], "data": "x.npz"}, "epochs is at least 1"),
    ({"steps": [{"train": {"epochs": "many"}}], "data": "x.npz"}, "epochs is an integer"),
    ({"steps": [{"train": {"epochs": 1.5}}], "data": "x.npz"}, "epochs is an integer"),
    ({"steps": [{"train": {"lr": "1e-3"}}], "data": "x.npz"}, "with a point"),
    ({"steps": [{"prune": {"keep": "a"}}]}, "keep is an integer"),
    ({"steps": [{"prune": {"blocks": "no"}}]}, "true or false"),
    ({"steps": [{"prune": {"steps": 2.5, "train": {}}}], "data": "x.npz"}, "no such schedule"),
    ({"steps": [{"prune": {"drop": "a", "train": {}}}], "data": "x.npz"}, "drop is a number"),
    ({"steps": [{"prune": {"drop": -1, "train": {}}}], "data": "x.npz"}, "a drop is 0 or more"),
    ({"steps": ["cluster", "prune"]}, "cannot come after 'cluster'.*fix: prune before cluster"),
    ({"steps": ["quantize", "train"], "data": "x.npz"}, "cannot come after 'quantize'"),
    ({"steps": ["cluster", "quantize"]}, "once"),
    ({"steps": ["prune"], "format": "zip"}, "unknown format"),
    ({"steps": ["prune"], "seed": "1"}, "a seed is an integer"),
    ({"steps": ["prune"], "calib": 3}, "is a name"),
    ({"steps": ["prune"], "calib": "x", "input": "y"}, "not both"),
]


@pytest.mark.parametrize(("recipe", "text"), WRONG, ids=range(len(WRONG)))
def test_recipes_that_make_no_sense(recipe, text):
    with pytest.raises(UsageError, match=text):
        read_recipe(recipe)


@pytest.mark.parametrize("name", ["data", "val", "calib"])
def test_data_that_are_not_finite_are_refused_before_any_step(name, folder):
    bad = dict(np.load("train.npz"))
    bad["input"][3, 1] = np.nan
    np.savez("bad.npz", **({"input": bad["input"]} if name == "calib" else bad))
    files = {"data": "train.npz", "val": "train.npz", "calib": "real.npz"} | {name: "bad.npz"}
    (folder / "bad.json").write_text(json.dumps({"steps": [{"train": {"epochs": 1}}]} | files))
    before, said = names(folder), list[str]()
    with pytest.raises(InputError, match=r"bad\.npz.*(NaN|finite)|(NaN|finite).*bad\.npz"):
        compress_file(CompressRequest("bad.json", "net.pt", "out", "work"), told=said.append)
    assert names(folder) == before
    assert not any("train" in text for text in said)


def test_files_that_are_no_recipes(tmp_path, monkeypatch):
    for name, content in (
        ("a.yaml", b"steps: ["),
        ("b.yaml", b"- 1"),
        ("c.yaml", b"\xff\xfe"),
        ("d.json", b"{"),
        ("e.yaml", b"!!python/object/apply:os.system ['true']"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_recipe(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        read_recipe(tmp_path / "none.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"qkit-torch\[compress\]"):
        read_recipe(tmp_path / "b.yaml")


def test_the_command(folder):
    done = command("compress", "recipe.yaml", "net.pt", "--dry-run", cwd=folder)
    assert done.code == 0, done.err
    assert "2. prune (fewer channels, neurons and heads): amount 0.3" in done.out
    assert names(folder) == ["net.pt", "real.npz", "recipe.yaml", "train.npz"]
    (folder / "one.yaml").write_text("steps: [cluster]\nformat: coded\n")
    done = command("compress", "one.yaml", "net.pt", cwd=folder)
    assert done.code == 0, done.err
    assert "in a fresh process" in done.out
    assert "net-compressed.qkit" in names(folder)
    with pytest.raises(UsageError, match="the output exists"):
        compress_file(CompressRequest("one.yaml", "net.pt"))
