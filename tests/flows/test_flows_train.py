"""The training loop: what it learns, what it refuses, and how it is stopped and gone on with."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from command import ENVIRONMENT, names, python
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qkit import errors
from qkit.flows.train import TrainOptions, evaluate, labelled, open_train, stream_of, train
from qkit.flows.train.checkpoint import BEST, LAST, read_facts
from qkit.flows.train.tables import LOSSES, learning_rate


def data(n: int = 70) -> tuple[Tensor, Tensor]:
    """Classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator)
    return x, (x[:, :3] + 0.1 * torch.randn(n, 3, generator=generator)).argmax(1)


def model(seed: int = 0) -> nn.Sequential:
    """With all that has state, or draws random numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


OPTIONS = TrainOptions(epochs=3, batch_size=16, lr=0.02, warmup=0.5)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_learns_and_keeps_the_best_epoch(tmp_path):
    net, told, steps = model(), [], []
    before = torch.get_rng_state()
    done = train(
        net,
        labelled(*data()),
        val=labelled(*data(30)),
        options=TrainOptions(epochs=12, batch_size=16, lr=0.05, patience=4),
        folder=tmp_path,
        told=told.append,
        progress=lambda n, total, text: steps.append((n, total, text)),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert done.best > 85
    assert done.best == max(row["val_accuracy"] for row in done.history)
    assert done.history[done.best_epoch - 1]["val_accuracy"] == done.best
    assert evaluate(net, labelled(*data(30)))["accuracy"] == pytest.approx(done.best)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert done.peak_rss_bytes > 1e6
    assert steps[-1][0] == 5 * len(done.history)
    assert steps[0][1] == 5 * 12
    assert "epoch 1/12 loss" in steps[0][2]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [float(row["val_accuracy"]) for row in rows] == [
        row["val_accuracy"] for row in done.history
    ]
    assert told[0].startswith("epoch 1: loss")
    assert (tmp_path / "train.log").read_text().count("epoch 1: loss") == 1
    assert {LAST, BEST, "metrics.csv", "train.log"} <= set(names(tmp_path))
    if len(done.history) < 12:
        assert "stopped early" in told[-1]
    json.dumps(done.to_json())


def test_early_stopping_and_the_last_weights():
    x, y = data()
    told: list[str] = []
    frozen = TrainOptions(epochs=9, batch_size=16, lr=1e-30, patience=2, keep="last")
    net = nn.Linear(5, 3)
    done = train(net, labelled(x, y), val=labelled(x, y), options=frozen, told=told.append)
    assert len(done.history) == 3
    assert (done.best_epoch, told[-1]) == (1, "stopped early: no better accuracy since epoch 1")


SCRIPT = """
import os, signal, sys
import torch
from test_flows_train import OPTIONS, data, labelled, model, train
from dataclasses import replace
torch.set_num_threads(1)
folder, at = sys.argv[1], int(sys.argv[2])
seen = []
def progress(done, total, text):
    seen.append(done)
    if len(seen) == at:
        os.kill(os.getpid(), signal.SIGKILL)
options = replace(OPTIONS, save_seconds=0)
train(model(9), labelled(*data()), val=labelled(*data(30)), options=options,
      folder=folder, resume=True, progress=progress)
"""


def kill(folder: Path, at: int) -> None:
    here = Path(__file__).parent
    env = {"PYTHONPATH": f"{here}:{here.parent}"}
    done = python("-c", SCRIPT, str(folder), str(at), env=ENVIRONMENT | env)
    assert done.code == -signal.SIGKILL, done.err


@pytest.mark.usefixtures("one_thread")
def test_killed_in_the_middle_it_ends_with_the_same_weights(tmp_path):
    want = model()
    history = train(
        want, labelled(*data()), val=labelled(*data(30)), options=OPTIONS, folder=tmp_path / "want"
    ).history
    first = model()  # the run to be killed starts from the same weights
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(
            first,
            labelled(*data()),
            val=labelled(*data(30)),
            options=TrainOptions(**vars(OPTIONS) | {"save_seconds": 0}),
            folder=out,
            progress=stop_at(2),
        )
    kill(out, 2)
    kill(out, 5)
    (out / ".last.safetensors.partial-1").write_bytes(b"cut")  # as a kill while writing leaves it
    net, told = model(9), []
    done = train(
        net,
        labelled(*data()),
        val=labelled(*data(30)),
        options=OPTIONS,
        folder=out,
        resume=True,
        told=told.append,
    )
    assert told[0].startswith("resumed: epoch ")
    assert equal(net, want)
    assert [(r["loss"], r["val_loss"], r["lr"]) for r in done.history] == [
        (r["loss"], r["val_loss"], r["lr"]) for r in history
    ]
    ours, theirs = read_facts(out / LAST)[2], read_facts(tmp_path / "want" / LAST)[2]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert names(out) == names(tmp_path / "want")


def stop_at(step: int):
    def progress(done: int, total: int, text: str) -> None:
        if done == step + 1:
            raise KeyboardInterrupt

    return progress


def test_another_run_is_not_resumed(tmp_path):
    pair = labelled(*data())
    train(model(), pair, options=OPTIONS, folder=tmp_path)
    with pytest.raises(errors.UsageError, match="holds the checkpoints of a run"):
        train(model(), pair, options=OPTIONS, folder=tmp_path)
    with pytest.raises(errors.UsageError, match=r"another one.*options: .*0\.02"):
        train(model(), pair, options=TrainOptions(lr=0.5), folder=tmp_path, resume=True)
    with pytest.raises(errors.UsageError, match=r"another one.*data"):
        train(model(), labelled(*data(50)), options=OPTIONS, folder=tmp_path, resume=True)
    other = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(errors.InputError, match=r"of another model.*1\.bias"):
        train(other, pair, options=OPTIONS, folder=tmp_path, resume=True)
    finished = model(4)
    train(finished, pair, options=OPTIONS, folder=tmp_path, resume=True)  # nothing is left to do
    (tmp_path / LAST).write_bytes(b"\0" * 99)
    with pytest.raises(errors.InputError, match=r"damaged.*last\.safetensors"):
        train(model(), pair, options=OPTIONS, folder=tmp_path, resume=True)
    with pytest.raises(errors.UsageError, match="without a folder"):
        train(model(), pair, resume=True)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, y = data(44)  # 16 + 16 + 12, and with 8 at a time four steps' parts that are not alike

    def trained(size: int, parts: int) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        options = TrainOptions(
            epochs=2, batch_size=size, accumulate=parts, optimizer="sgd", lr=0.1, clip=1.0
        )
        train(net, labelled(x.double(), y), options=options)
        return net

    whole, parts = trained(16, 1), trained(8, 2)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        # The model's outputs count in float, as losses do: 2^-24 relative, over six steps.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("sgd", "constant"), ("adam", "cosine"), ("adamw", "linear"), ("rmsprop", "step")],
)
def test_every_optimizer_and_schedule_lowers_the_loss(name, schedule):
    options = TrainOptions(
        epochs=4,
        batch_size=16,
        lr=0.005,
        optimizer=name,
        schedule=schedule,
        step_epochs=2,
        momentum=0.5,
    )
    done = train(model(), labelled(*data()), options=options)
    assert done.metric == "accuracy"
    assert done.history[-1]["loss"] < done.history[0]["loss"]


def test_schedules_by_hand():
    options = TrainOptions(epochs=5, lr=1.0, warmup=1.0)
    assert learning_rate(options, 0, 0.0, 0.25) == 0.25
    assert learning_rate(options, 0, 0.5, 0.25) == 0.75
    assert learning_rate(options, 1, 0.0, 0.25) == 1.0
    assert learning_rate(options, 3, 0.0, 0.25) == pytest.approx(0.5)  # half of the cosine
    stairs = TrainOptions(epochs=9, lr=1.0, schedule="step", step_epochs=3, gamma=0.1)
    rates = [learning_rate(stairs, epoch, 0.5, 0.1) for epoch in range(9)]
    assert rates == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3)


def test_kinds_of_data_are_the_same_samples(tmp_path, monkeypatch):
    x, y = data(32)
    np.savez(tmp_path / "d.npz", features=x.numpy(), labels=y.numpy().astype(np.uint8))
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        f"x, y = torch.tensor({x.tolist()}), torch.tensor({y.tolist()})\n"
        "def batches():\n    for i in range(0, 32, 16):\n        yield x[i:i+16], y[i:i+16]\n"
        "def dicts():\n    return [{'input': a, 'labels': b} for a, b in batches()]\n"
        "def dataset():\n    return TensorDataset(x, y)\n"
        "def pair():\n    return x, y\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    net = model().eval()
    want = evaluate(net, labelled(x, y))
    sources = [open_train(str(tmp_path / "d.npz"))]
    sources += [open_train(f"own:{name}") for name in ("batches", "dicts", "dataset", "pair")]
    sources += [stream_of(lambda: DataLoader(TensorDataset(x, y), 16), "loader")]
    for source in sources:
        assert evaluate(net, source, batch_size=16) == pytest.approx(want)
        assert train(model(), source, options=OPTIONS).history[-1]["step"] == 6


def test_regression_by_a_function():
    x = torch.randn(64, 5)
    net = nn.Linear(5, 1)

    def off(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    options = TrainOptions(epochs=20, lr=0.1, batch_size=16)
    done = train(net, labelled(x, x.sum(1, keepdim=True)), loss=off, options=options)
    assert done.metric == "loss"
    assert done.best < 0.05
    done = train(nn.Linear(5, 1), labelled(x, x.sum(1, keepdim=True)), loss="mse", options=options)
    assert done.best < 0.01


def test_next_token_loss_is_the_cross_entropy_of_what_comes_next():
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    ids[1, 3] = -100
    want = [
        -float(logits[b, i].log_softmax(0)[ids[b, i + 1]])
        for b in range(2)
        for i in range(3)
        if ids[b, i + 1] != -100
    ]
    assert float(LOSSES["next-token"].function(logits, ids)) == pytest.approx(np.mean(want))


def test_bf16_is_used_where_it_is_asked_for():
    seen = []

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    net = Net(5, 3)
    train(net, labelled(*data()), options=TrainOptions(epochs=1, precision="bf16", batch_size=16))
    assert torch.bfloat16 in seen
    assert net.weight.dtype == torch.float32
    assert net(data()[0]).dtype == torch.float32  # as it was, behind the training


X, Y = data(12)


@pytest.mark.parametrize(
    ("x", "y", "loss", "message"),
    [
        (X.index_fill(1, torch.tensor([2]), torch.nan), Y, "cross-entropy", "not finite.*12 NaN"),
        (X, Y.float(), "cross-entropy", "do not fit the loss 'cross-entropy': probabilities"),
        (X, Y[:5], "cross-entropy", r"another number of samples.*targets \(5,\)"),
        (X, Y[:, None], "cross-entropy", r"class numbers have the shape \(2,\)"),
        (X, Y.index_fill(0, torch.tensor([11]), 3), "cross-entropy", "0 to 2: found 0 to 3"),
        (X, Y, "mse", "values are floats"),
        (X, torch.zeros(12, 2), "mse", r"values have the outputs' shape \(2, 3\)"),
        (X, None, "cross-entropy", "have no targets"),
        (X[:0], Y[:0], "cross-entropy", "are empty"),
        (X[:, :4], Y, "cross-entropy", "the model fails on the inputs"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(x, y, loss, message, tmp_path):
    with pytest.raises(errors.InputError, match=message):
        train(model(), labelled(x, y), loss=loss, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_streams_and_requests_that_cannot_be_used(tmp_path):
    def refused(match: str, *args, kind=errors.InputError, **given):
        with pytest.raises(kind, match=match):
            train(model(), *args, **given)

    good = labelled(X, Y)
    refused("are empty", [])
    refused("used once only", iter([(X, Y)]), kind=errors.UsageError)
    refused("a batch is", [(X,)])
    refused("targets are a tensor", [(X, [1, 2])])
    refused("unknown loss.*cross-entropy", good, loss="cros-entropy", kind=errors.UsageError)
    refused("unknown metric.*accuracy", good, metric="acuracy", kind=errors.UsageError)
    refused(
        r"diverges.*epoch 2, step 1; got: nan", good, options=TrainOptions(optimizer="sgd", lr=1e30)
    )
    refused("not one number", good, loss=lambda a, b: a)
    np.savez(tmp_path / "x.npz", a=X.numpy(), b=X.numpy())
    with pytest.raises(errors.InputError, match=r"no targets.*labels"):
        open_train(str(tmp_path / "x.npz"))
    frozen = model().requires_grad_(False)
    with pytest.raises(errors.UsageError, match="nothing to train"):
        train(frozen, good)
    for wrong, match in (
        ({"epochs": 0}, "epochs is at least 1"),
        ({"lr": float("nan")}, "lr is more than 0"),
        ({"optimizer": "adan"}, "unknown optimizer.*adamw"),
        ({"schedule": "cos"}, "unknown schedule.*cosine"),
        ({"precision": "int8"}, "unknown precision"),
        ({"trackers": ("tensorbord",)}, "unknown tracker.*tensorboard"),
    ):
        with pytest.raises(errors.UsageError, match=match):
            TrainOptions(**wrong)
    with pytest.raises(errors.MissingExtraError, match="pip install"):
        train(model(), good, options=TrainOptions(trackers=("wandb",)))
