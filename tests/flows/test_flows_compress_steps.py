"""Steps that learn and steps that write for a runtime: distill, taylor, rounds, qat, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qkit
from qkit.errors import BudgetError, InputError, UsageError
from qkit.flows.compress import CompressRequest, Ledger, compress_file, read_recipe
from qkit.flows.compress.document import ledger_document
from qkit.flows.compress.given import Given
from qkit.flows.train import labelled
from qkit.spec import steps_of
from qkit.targets.artifact import read_artifact


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()


X = torch.from_numpy(np.random.default_rng(0).normal(size=(256, 20)).astype("f4"))
Y = X[:, :4].argmax(1)
TRAIN = {"epochs": 2, "lr": 0.01}


def follow(*steps: Any, model: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, Ledger]:
    data, recipe = labelled(X, Y), {"steps": list(steps)} | fields
    return qkit.compress(model or make(), recipe, calib=X[:64], data=data, val=data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(make(), tmp_path / "net.pt")
    np.savez(tmp_path / "train.npz", input=X.numpy(), labels=Y.numpy())
    return tmp_path


def written(steps: list[Any], output: str, **fields: Any) -> Ledger:
    recipe = {"steps": steps, "data": "train.npz", "val": "train.npz"} | fields
    Path("recipe.json").write_text(json.dumps(recipe))
    return compress_file(CompressRequest("recipe.json", "net.pt", output))


def test_a_student_learns_from_the_model_as_it_was():
    whole, _ = follow({"train": TRAIN | {"epochs": 8}})
    student = {"distill": TRAIN | {"teacher": 0.5, "match": ["1=1"]}}
    small, ledger = follow({"prune": {"amount": 0.6}}, student, model=whole)
    _, pruned, distilled = ledger.rows
    assert distilled.parameters == pruned.parameters
    assert distilled.metrics["loss"] < pruned.metrics["loss"]
    # The teacher is the model before the first step: here one that knows nothing.
    alone, _ = follow({"train": {"epochs": 1}}, {"distill": TRAIN | {"teacher": 1.0}})
    with torch.no_grad():
        far = [(m(X).softmax(1) - make()(X).softmax(1)).abs().mean() for m in (small, alone)]
    assert far[1] < far[0] / 2


def test_zeros_stay_when_a_student_learns():
    small, ledger = follow({"sparsify": {"amount": 0.7}}, {"distill": TRAIN})
    assert ledger.rows[2].nonzeros == ledger.rows[1].nonzeros
    assert float((small[2].weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    "step",
    [
        {"sparsify": {"amount": 0.5, "steps": 2, "train": TRAIN | {"teacher": 1.0}}},
        {"cluster": {"entries": 4, "train": TRAIN | {"teacher": 1.0, "temperature": 2.0}}},
    ],
    ids=["sparsify", "cluster"],
)
def test_the_trainings_of_a_step_listen_to_a_teacher(step):
    """Labels that are wrong do less harm where only the teacher counts."""
    whole, _ = follow({"train": TRAIN | {"epochs": 8}})
    wrong = labelled(X, (Y + 1) % 4)

    def far(train: dict[str, Any]) -> float:
        """How far the answers of the model of this training are from the teacher's."""
        name, options = next(iter(step.items()))
        recipe = {"steps": [{name: options | {"train": train}}]}
        small, _ = qkit.compress(whole, recipe, calib=X[:64], data=wrong)
        with torch.no_grad():
            return float((small(X).softmax(1) - whole(X).softmax(1)).abs().mean())

    taught = next(iter(step.values()))["train"]
    assert far(taught) < 0.9 * far(TRAIN)


@pytest.mark.parametrize(
    "step",
    [
        {"sparsify": {"amount": 0.6, "method": "taylor"}},
        {"sparsify": {"amount": 0.6, "method": "snip"}},
    ],
)
def test_what_the_loss_needs_stays(step):
    """Inputs that no label depends on are what goes first, as gradients tell."""
    trained = {"train": TRAIN | {"epochs": 15}}
    _, ledger = follow(trained, step)
    _, drawn = follow(trained, {"sparsify": step["sparsify"] | {"method": "random"}})
    assert ledger.rows[2].nonzeros < ledger.rows[1].nonzeros
    assert ledger.rows[2].metrics["loss"] < drawn.rows[2].metrics["loss"]


def test_channels_go_by_the_loss_on_the_training_data():
    data, net = labelled(X, Y), make()
    given = Given(None, data=data)
    small, _ = follow({"prune": {"amount": 0.4, "importance": "taylor"}})
    options = {"importance": "taylor", "loss": given.total_loss}
    by_hand, _ = qkit.prune(net, X[:64], amount=0.4, latency=False, **options)
    assert torch.equal(small[0].weight, by_hand[0].weight)
    l1, _ = follow({"prune": {"amount": 0.4}})
    assert l1[0].weight.shape != small[0].weight.shape or not torch.equal(
        l1[0].weight, small[0].weight
    )


def test_pruning_in_rounds_trains_after_each():
    said: list[str] = []
    data = labelled(X, Y)
    step = {"prune": {"amount": 0.6, "steps": 3, "train": TRAIN, "round_to": 1}}
    recipe = {"steps": [{"train": TRAIN}, step]}
    _, ledger = qkit.compress(make(), recipe, calib=X, data=data, val=data, told=said.append)
    assert ledger.rows[2].multiply_adds <= 0.4 * ledger.rows[1].multiply_adds
    assert len([text for text in said if text.startswith("step ")]) == 3
    assert len([text for text in said if text.startswith("epoch ")]) == 2 + 3 * 2


def test_zeros_in_rounds_and_a_floor():
    sparse, ledger = follow({"train": TRAIN}, {"sparsify": {"amount": 0.8, "steps": 2,
                                                           "train": TRAIN}})  # fmt: skip
    assert float((sparse[2].weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert ledger.rows[2].nonzeros < 0.3 * ledger.rows[1].nonzeros
    with pytest.raises(BudgetError, match="first step"):
        follow({"prune": {"amount": 0.5, "steps": 2, "floor": 101.0, "train": TRAIN}})
    # Of a metric of which less is better, the floor is what it must not be above.
    small, _ = follow({"prune": {"amount": 0.5, "floor": 50.0, "train": TRAIN}}, metric="loss")
    assert small[0].out_features < 64
    with pytest.raises(BudgetError):
        follow({"prune": {"amount": 0.5, "floor": 1e-6, "train": TRAIN}}, metric="loss")


def mean_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.softmax(1) - nn.functional.one_hot(targets, 4)).abs().mean()


def test_loss_and_metric_are_the_recipes(folder):
    (folder / "own_scores.py").write_text(
        "from torch import nn\n\n\ndef error(outputs, targets):\n"
        "    return (outputs.softmax(1) - nn.functional.one_hot(targets, 4)).abs().mean()\n"
    )
    steps = [{"train": TRAIN}]
    ledger = written(steps, "out", loss="own_scores.py:error", metric="own_scores.py:error")
    trained = qkit.load("out", into=make)
    with torch.no_grad():
        wanted = float(mean_error(trained(X), Y))
    assert ledger.rows[1].metrics == pytest.approx({"loss": wanted, "error": wanted}, rel=1e-4)
    with pytest.raises(UsageError, match="unknown loss"):
        written(steps, "no", loss="square")
    with pytest.raises(UsageError, match="unknown metric"):
        written(steps, "no", metric="f1")


def test_a_pruned_model_for_a_runtime_in_float(folder):
    ledger = written([{"prune": {"amount": 0.5}}, "export"], "out", input="8x20")
    before, pruned, exported = ledger.rows
    assert exported.bytes == (folder / "out" / "model.onnx").stat().st_size < before.bytes * 0.6
    assert exported.metrics == pytest.approx(pruned.metrics, rel=1e-4)
    assert exported.latency_ms > 0
    assert ledger.verification["runtime"].startswith("onnxruntime")
    text = ledger_document(ledger, files={}, layers={}).dumps()
    assert "onnxruntime" in text
    assert ledger.verification["fresh_process"]
    assert qkit.verify("out")["status"] == "verified"
    assert read_recipe(json.loads((folder / "out" / "ledger.json").read_text())["recipe"])


def test_a_pruned_model_for_a_runtime_in_int8(folder):
    np.savez(folder / "real.npz", input=X[:64].numpy())
    steps = [{"train": TRAIN}, {"prune": {"amount": 0.5}},
             {"export": {"scheme": "int8-static", "ignore": ["4"]}}]  # fmt: skip
    ledger = written(steps, "out", calib="real.npz")
    assert ledger.rows[3].bytes < ledger.rows[2].bytes
    assert ledger.rows[3].metrics["accuracy"] == pytest.approx(
        ledger.rows[2].metrics["accuracy"], abs=5
    )
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["coverage"]["integer_layers"] == 2
    assert read_artifact("out").meta["source"]["files"]


def test_training_with_a_runtimes_rounding(folder):
    ledger = written([{"prune": {"amount": 0.5}}, {"qat": TRAIN | {"teacher": 0.5}}], "out")
    pruned, trained = ledger.rows[1:]
    assert trained.metrics["loss"] < pruned.metrics["loss"]
    assert trained.bytes == (folder / "out" / "model.onnx").stat().st_size < pruned.bytes
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["training"]["teacher"] == 0.5
    assert report["training"]["options"]["epochs"] == 2


def test_a_file_is_not_made_in_memory():
    with pytest.raises(UsageError, match="writes a file"):
        follow({"prune": {}}, "export")


WRONG = [
    (["distill"], "a step that makes it smaller comes before"),
    ([{"sparsify": {}}, {"factorize": {}}], "fills the zeros"),
    (["export", "train"], "cannot come after 'export'"),
    (["quantize", "export"], "one of cluster, quantize, qat, export, once"),
    ([{"export": {"target": "torch"}}], "not a target"),
    ([{"export": {"target": 3}}], "a target is a name|not a target"),
    ([{"export": {"scheme": "nf4"}}], "nf4"),
    ([{"export": {"ignore": ["0"]}}], "needs a scheme"),
    ([{"export": {"scheme": "int8-static", "observer": "eyes"}}], "unknown observer"),
    ([{"export": {"scheme": "int8-static"}}], "learns from real inputs"),
    ([{"qat": {"teacher": 2}}], "between 0 and 1|0 to 1|weight"),
    ([{"qat": {"epochs": 0}}], "epochs is at least 1"),
    (["train", {"distill": {"temperature": 0}}], "temperature"),
    (["train", {"distill": {"match": "layers"}}], "list of texts"),
    (["train", {"distill": {"teacher_precision": "w9"}}], "unknown scheme"),
    ([{"prune": {"steps": 3}}], "training after each step"),
    ([{"prune": {"steps": 0, "train": {}}}], "no such schedule"),
    ([{"prune": {"drop": 1, "floor": 2, "train": {}}}], "not both"),
    ([{"prune": {"unit": "latency", "train": {}}}], "what can be counted"),
    ([{"prune": {"train": 3}}], "options of its own"),
    ([{"sparsify": {"amount": "2:4", "train": {}}}], "not a pattern"),
]


@pytest.mark.parametrize(("steps", "text"), WRONG, ids=range(len(WRONG)))
def test_recipes_that_make_no_sense(steps, text):
    with pytest.raises((UsageError, qkit.QkitError), match=text):
        read_recipe({"steps": steps, "data": "x.npz"})


def test_labels_are_asked_for_before_any_work():
    for step in ({"prune": {"importance": "taylor"}}, {"sparsify": {"method": "snip"}}, "qat"):
        with pytest.raises(UsageError, match="learns from labels"):
            read_recipe({"steps": [step]})
    with pytest.raises(UsageError, match="writes the file of a runtime"):
        read_recipe({"steps": ["export"], "format": "coded"})
    wrong = labelled(X, torch.full((len(X),), 4))
    with pytest.raises(InputError, match="class numbers"):
        qkit.compress(make(), {"steps": ["train"]}, inputs=X, data=wrong)


@pytest.mark.usefixtures("same_process")
def test_single_commands_write_recipes_of_one_step(folder):
    net, x = make(), X[:8]
    for name, (model, report) in {
        "prune": qkit.prune(net, x, amount=0.5),
        "factorize": qkit.factorize(net, rank=4, inputs=x),
    }.items():
        qkit.save(model, folder / name, inputs=x, report=report)
        recipe = read_artifact(folder / name).meta["recipe"]
        assert steps_of(recipe) == [name]
        again, _ = qkit.compress(net, recipe, inputs=x)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))


def test_steps_are_known_in_the_form_of_old_artifacts_too():
    assert steps_of({"step": "prune", "amount": 0.5}) == ["prune"]
    assert steps_of({"version": 1, "steps": [{"a": {}}, {"b": {}}]}) == ["a", "b"]
    for recipe in (None, [], {"version": 1, "rules": []}, {"steps": 3}, {"steps": [3]}):
        assert steps_of(recipe) == []


@pytest.mark.usefixtures("same_process")
def test_what_steps_made_is_a_model_for_other_commands(folder):
    written([{"train": TRAIN}, {"sparsify": {"amount": 0.5}}], "sparse")
    report = qkit.flows.quantize_file(qkit.flows.Request("sparse", output="both"))
    assert report.coverage["layers_quantized"] == 3
    assert (qkit.load("both")(X) - qkit.load("sparse", into=make)(X)).abs().max() < 1
