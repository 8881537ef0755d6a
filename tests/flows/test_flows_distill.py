"""A student that learns from its teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkit import errors, load
from qkit.distill import Match
from qkit.flows import verify
from qkit.flows.demo import Digits, load_digits
from qkit.flows.distill import CACHE, Teaching, distill
from qkit.flows.distill_file import DistillRequest, distill_file
from qkit.flows.quantize import Request, quantize_file
from qkit.flows.train import TrainOptions, TrainRequest, evaluate, labelled, train

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """``width`` channels, twice."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16 * width, classes)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.body(x).flatten(1))


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def teacher(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = Net(16)
    options = TrainOptions(epochs=5, lr=3e-3)
    train(model, labelled(digits.train_x, digits.train_y), options=options)
    return model


OPTIONS = TrainOptions(epochs=6, lr=5e-3, batch_size=32)


def student(width: int = 2) -> Net:
    torch.manual_seed(1)
    return Net(width)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_student_learns_from_answers_alone(teacher, digits):
    """Without a label, from pictures of which there are no labels at all."""
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    net, test = student(4), labelled(digits.test_x, digits.test_y)
    unlabelled = labelled(digits.train_x, None)
    done = distill(net, teacher, unlabelled, val=test, options=OPTIONS)
    assert not net.training
    assert done.best > 90
    assert evaluate(net, test)["accuracy"] == pytest.approx(done.best)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) or teacher.training is False


def test_with_few_labels_the_teacher_helps(teacher, digits):
    """What a tenth of the labels teach, and the same with a teacher's answers to everything."""
    test = labelled(digits.test_x, digits.test_y)
    few = labelled(digits.train_x[:130], digits.train_y[:130])
    longer = TrainOptions(epochs=30, lr=5e-3, batch_size=32, keep="last")
    plain, taught = student(), student()
    train(plain, few, options=longer)
    distill(taught, teacher, labelled(digits.train_x, None), options=OPTIONS)
    scores = [evaluate(net, test)["accuracy"] for net in (plain, taught)]
    assert scores[1] > scores[0] + 1


def test_answers_are_cached_on_disk(teacher, digits, tmp_path):
    data = labelled(digits.train_x[:200], digits.train_y[:200])
    short = TrainOptions(epochs=3, lr=5e-3, batch_size=32)
    plain = student()
    distill(plain, teacher, data, options=short)
    told: list[str] = []
    for attempt in range(2):
        net, teaching = student(), Teaching(cache=tmp_path)
        teacher.calls = 0
        distill(net, teacher, data, teaching=teaching, options=short, told=told.append)
        assert teacher.calls == (4 if attempt == 0 else 3) - 1  # its checks; the answers, once
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            # Answers to other batches are summed in another order: 1e-7, over 21 steps of Adam.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert sum("computing the teacher's answers to 200" in line for line in told) == 1
    assert (tmp_path / CACHE).is_file()
    other = Net(16)
    distill(student(), other, data, teaching=Teaching(cache=tmp_path), options=short,
            told=told.append)  # fmt: skip
    assert sum("computing the teacher's answers" in line for line in told) == 2
    stream = [(digits.train_x[:9], digits.train_y[:9])]
    with pytest.raises(errors.UsageError, match="for data in memory"):
        distill(student(), teacher, stream, teaching=Teaching(cache=tmp_path), options=short)


@pytest.mark.parametrize("precision", ["bf16", "w8a16"])
def test_a_teacher_in_low_precision(teacher, digits, precision):
    data = labelled(digits.train_x[:200], digits.train_y[:200])
    short = TrainOptions(epochs=2, lr=5e-3, batch_size=32)
    done = distill(student(), teacher, data, teaching=Teaching(precision=precision), options=short)
    exact = distill(student(), teacher, data, options=short)
    assert done.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.05)
    assert done.history[-1]["loss"] != exact.history[-1]["loss"]


def test_features_are_learnt_too_and_a_run_goes_on(teacher, digits, tmp_path):
    data = labelled(digits.train_x[:300], digits.train_y[:300])
    matches = (Match("body.2", "body.2"), Match("body.5", "body.5", "attention"))
    teaching = Teaching(matches=matches)
    want = student()
    done = distill(want, teacher, data, teaching=teaching, options=OPTIONS)
    assert done.history[-1]["loss"] < 0.85 * done.history[0]["loss"]
    assert want(digits.test_x).shape == (450, 10)

    def stop(n: int, total: int, text: str) -> None:
        if n == 23:
            raise KeyboardInterrupt

    often = TrainOptions(**vars(OPTIONS) | {"save_seconds": 0})
    with pytest.raises(KeyboardInterrupt):
        distill(student(), teacher, data, teaching=teaching, options=often, folder=tmp_path,
                progress=stop)  # fmt: skip
    again = student()
    distill(again, teacher, data, teaching=teaching, options=OPTIONS, folder=tmp_path, resume=True)
    assert same(again, want)
    with pytest.raises(errors.UsageError, match=r"another one.*teaching"):
        distill(student(), teacher, data, options=OPTIONS, folder=tmp_path, resume=True)


def test_what_makes_no_sense(teacher, digits):
    data = labelled(digits.train_x[:9], digits.train_y[:9])
    with pytest.raises(errors.InputError, match="teacher and student have different outputs"):
        distill(Net(2, 7), teacher, data)
    for wrong in (
        {"weight": 1.5},
        {"temperature": -1.0},
        {"cache": Path("x"), "matches": (Match("0", "0"),)},
    ):
        with pytest.raises(errors.UsageError):
            Teaching(**wrong)


def test_from_files_to_a_student_that_can_be_quantized(teacher, digits, tmp_path, same_process):
    net = nn.Sequential(*teacher.body, nn.Flatten(), teacher.head)
    torch.save(net, tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", x=digits.train_x.numpy(), labels=digits.train_y.numpy())
    training = TrainRequest(str(tmp_path / "d.npz"), options=TrainOptions(epochs=2, lr=2e-3))
    out = tmp_path / "student"
    request = DistillRequest(str(tmp_path / "net.pt"), training, width=0.4, output=str(out))
    report = distill_file(request)
    assert report.verification["status"] == "verified"
    assert report.after["params"] < 0.45 * report.before["params"]
    assert report.size_bytes["ratio"] < 0.6
    assert report.metrics["accuracy"]["student"] > 60
    assert verify(out)["status"] == "verified"
    assert load(out)(digits.test_x).shape == (450, 10)
    # An artifact, as any model: quantized, and a teacher in turn.
    done = quantize_file(Request(str(out), output=str(tmp_path / "student8")))
    assert done.coverage["layers_quantized"] == 3
    with pytest.raises(errors.UsageError, match="in one way"):
        distill_file(DistillRequest(str(tmp_path / "net.pt"), training, width=0.4, keep_layers=1))
    with pytest.raises(errors.UsageError, match="share of the parameters"):
        distill_file(DistillRequest(str(tmp_path / "net.pt"), training, width=1.0))
    with pytest.raises(errors.UsageError, match="not a match"):
        distill_file(
            DistillRequest(
                str(tmp_path / "net.pt"),
                training,
                width=0.4,
                match=("a:attention",),
                output=str(tmp_path / "other"),
            )
        )
