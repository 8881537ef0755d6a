"""``qkit quantize --train``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qkit.flows.demo import load_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing, data to train it with, and some that do not fit."""
    out, digits = tmp_path_factory.mktemp("train"), load_digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    torch.save(net, out / "net.pt")
    np.savez(out / "train.npz", x=digits.train_x[:320].numpy(), labels=digits.train_y[:320])
    np.savez(out / "val.npz", x=digits.test_x.numpy(), labels=digits.test_y.numpy())
    np.savez(out / "wrong.npz", x=np.zeros((4, 1, 8, 8), np.float32), labels=[0, 1, 2, 10])
    return out


QAT = ("--scheme", "int8-qat", "--target", "onnx")


def test_training_from_the_command_line(folder, tmp_path, main):
    asked = ("quantize", folder / "net.pt", *QAT, "-o", tmp_path / "out")
    done = main(*asked, "--train", folder / "train.npz", "--val", folder / "val.npz",
                "--epochs", "4", "--lr", "0.01", "--batch-size", "16", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["training"]["options"]["epochs"] == 4
    assert done.json["metrics"]["accuracy"]["trained int8"] > 60  # of 10 before
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "out-training" / "metrics.csv").is_file()
    again = main(*asked, "--train", folder / "train.npz", "--overwrite")
    assert (again.code, "holds the checkpoints of a run" in again.error) == (2, True)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (QAT, 2, "takes a scheme and data"),
        (("--scheme", "int8-static", "--target", "onnx", "--train", "d.npz"), 2,
         "takes a scheme and data"),
        ((*QAT, "--epochs", "3", "--val", "d.npz"), 2, "--epochs, --val"),
        ((*QAT, "--train", "{}/wrong.npz"), 3, "class numbers are 0 to 9: found 0 to 10"),
        ((*QAT, "--train", "{}/none.npz"), 3, "none.npz"),
        ((*QAT, "--train", "{}"), 3, "does not tell classes"),
        ((*QAT, "--train", "d.npz", "--lr", "-1"), 2, "lr is more than 0"),
        (("--train", "d.npz"), 2, "an option of another target"),
        (("--scheme", "int8-qat"), 2, "scheme"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(folder, tmp_path, main, options, code, message):
    given = [option.replace("{}", str(folder)) for option in options]
    done = main("quantize", folder / "net.pt", *given, "-o", tmp_path / "out")
    assert (done.code, message in done.error) == (code, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_distilling_from_the_command_line(folder, tmp_path, main, monkeypatch):
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sequential(*block), nn.Linear(32, 10))
    torch.save(net, tmp_path / "net.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / "small.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), tmp_path / "nine.pt")
    train = ("--train", folder / "train.npz", "--epochs", "1", "--lr", "0.01")
    asked = ("distill", tmp_path / "net.pt", *train)
    out = tmp_path / "out"
    done = main(*asked, "--keep-layers", "2", "--match", "layers", "--match", "1=1",
                "--val", folder / "val.npz", "--json", "-o", out)  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["kind"] == "distillation"
    assert done.json["before"]["params"] - done.json["after"]["params"] == 2 * (32 * 32 + 32)
    assert set(done.json["metrics"]["accuracy"]) == {"teacher", "student"}
    assert (tmp_path / "out-training" / "best.safetensors").is_file()
    assert main("verify", out).code == 0
    shown = main(*asked, "--student", tmp_path / "small.pt", "--cache", "-o", tmp_path / "own")
    assert shown.code == 0, shown.err
    assert "teacher" in shown.out
    assert (tmp_path / "own-training" / "teacher.safetensors").is_file()
    (tmp_path / "data_of_cli.py").write_text("def broken():\n    raise RuntimeError('so')\n")
    late = np.append(np.arange(10).repeat(2), -1)  # wrong at the end
    np.savez(tmp_path / "late.npz", x=np.zeros((21, 1, 8, 8), "f4"), labels=late)
    for options, code, message in (
        (("--student", tmp_path / "nine.pt"), 3, "teacher and student have different outputs"),
        (("--train", tmp_path / "late.npz", "--keep-layers", "2"), 3, "found -1 to 9"),
        (
            ("--train", f"{tmp_path}/data_of_cli.py:broken", "--keep-layers", "2"),
            3,
            "the function of training data fails: RuntimeError: so",
        ),
        ((), 2, "a student is given in one way"),
        (("--keep-layers", "9"), 2, "fewer layers than its teacher"),
    ):
        wrong = main(*asked, *options, "-o", tmp_path / "wrong")
        assert (wrong.code, message in wrong.error) == (code, True), wrong.err
    wrong = main("distill", tmp_path / "net.pt", "--keep-layers", "2")
    assert (wrong.code, "learns from data" in wrong.error) == (2, True)
    assert not list(tmp_path.glob("wrong*"))
