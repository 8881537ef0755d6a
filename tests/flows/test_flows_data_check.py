"""What is said about calibration data, and what is not; the report of activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from command import qkit as command
from families.family import images
from torch import Tensor, nn

from qkit.flows import lower
from qkit.flows.data_check import looks_random, suspicions
from qkit.flows.demo import load_digits
from qkit.flows.pt2e import convert
from qkit.models import Inputs


def given(x: Tensor) -> Inputs:
    return Inputs((x,), {}, "test")


@pytest.mark.parametrize(
    "noise",
    [
        torch.randn(4, 3, 16, 16),
        torch.rand(4, 3, 16, 16) * torch.tensor([1.0, 5.0, 9.0])[:, None, None],
        torch.rand(8, 200),
        torch.randn(64, 30),
        torch.rand(64, 30) + 3,
        torch.randn(4, 50, 12),
        torch.randint(0, 1000, (64, 32)),
        torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
    ],
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}",
)
def test_noise_is_recognised(noise):
    assert looks_random(noise) or noise.shape == (8, 200)  # too few samples to tell


def speech() -> Tensor:
    return torch.randn(8, 400).cumsum(1)[:, None]


def words() -> Tensor:
    """Token numbers as frequent as words are: one over the rank."""
    ranks = torch.arange(1, 1000)
    return torch.multinomial(1.0 / ranks, 2048, replacement=True).reshape(64, 32)


@pytest.mark.parametrize(
    "real",
    [
        images(4, 3, 16),
        images(4, 3, 16) + 0.3 * torch.randn(4, 3, 16, 16),
        (images(4, 3, 16) * 40 + 128).clamp(0, 255).byte(),
        speech(),
        words(),
        torch.randn(64, 4) @ torch.randn(4, 30),
        torch.randn(64, 30) + torch.arange(30),
        torch.zeros(64, 30),
        torch.ones(64, 32, dtype=torch.int64),
        torch.ones(64, 32, dtype=torch.bool),
    ],
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}",
)
def test_real_data_are_not_taken_for_noise(real):
    assert not looks_random(real)


def test_real_digits_and_features_are_not_taken_for_noise():
    digits = load_digits().train_x[:64]
    assert not looks_random(digits)
    assert not looks_random(digits.flatten(1))


def normed() -> nn.Module:
    """A network whose batch-norms know pictures."""
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 5, 3))
    model[1].momentum = None
    with torch.no_grad():
        model(images(64, 3, 16))
    return model.eval()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x, False),
        (lambda x: x * 1.2 + 0.1, False),
        (lambda x: x * 0.226 + 0.449, True),  # not normalised
        (lambda x: (x * 0.226 + 0.449) * 255, True),  # nor divided by 255
        (lambda x: (x - 0.449) / 0.226, True),  # normalised twice
    ],
)
def test_another_normalisation_than_in_training(change, told):
    found = suspicions(normed(), given(change(images(64, 3, 16, seed=1))), 64)
    assert any("first batch-norm, 1," in text for text in found) == told, found


def test_a_batch_norm_that_was_never_trained_says_nothing():
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9)).eval()
    assert not suspicions(model, given(images(64, 3, 16)), 64)


def test_few_and_identical_samples():
    model = nn.Sequential(nn.Linear(33, 7))
    assert any("few" in text for text in suspicions(model, given(torch.ones(3, 33)), 3))
    found = suspicions(model, given(torch.rand(1, 33).expand(40, 33)), 40)
    assert found == ["calibration: all samples of input 0 are the same"]


def test_the_report_shows_each_activation(mlp, tmp_path):
    x = torch.randn(700, 33) @ torch.randn(33, 33)
    x[5, 7] = 100 * x.abs().max()
    report = lower(mlp, "int8-static", None, calib=x, observer="percentile", calib_report=True)
    rows = {row["name"]: row for row in report.calibration["activations"]}
    assert report.calibration["samples"] == 700
    assert list(rows) == ["input input", "1 (ReLU)"]
    row = rows["input input"]
    assert row["seen"] == (float(x.min()), float(x.max()))
    # By numpy, value by value; the distribution is known to half a cell.
    values = x.double().numpy().ravel()
    low, high = row["range"]
    step = (high - low) / 255
    outside = (values < low - step / 2) | (values > high + step / 2)
    assert row["clipped"] == outside.mean() > 0
    usual = np.quantile(np.abs(values), 0.999, method="inverted_cdf")
    cell = 2 * np.abs(values).max() / 4096
    assert row["outliers"] == pytest.approx(np.abs(values).max() / usual, rel=cell / usual)
    rounded = np.clip(np.round((values - low) / step), 0, 255) * step + low
    noise = math.sqrt(np.square(rounded - values).mean())
    found = math.sqrt(np.square(values).mean()) / 10 ** (row["sqnr_db"] / 20)
    assert abs(found - noise) <= cell / 2 + 1e-9 * noise
    assert rows["1 (ReLU)"]["clipped"] < 0.01


def test_watching_changes_nothing(mlp):
    x = torch.randn(40, 33)
    watched, plain = (convert(mlp, "int8-static", x, watch=watch) for watch in (True, False))
    assert torch.equal(watched.module(x), plain.module(x))
    assert plain.activations == ()
    assert all(row.clipped == 0 for row in watched.activations)


def test_dynamic_ranges_are_not_calibrated(mlp):
    report = lower(mlp, "int8-dynamic", None, calib=torch.randn(9, 33), calib_report=True)
    assert report.calibration == {}
    assert not any(remark.startswith("calibration") for remark in report.remarks)


def test_the_command_prints_it(mlp, tmp_path):
    torch.save(mlp, tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(40, 33)))
    options = ("--scheme", "int8-static", "--calib", "data.npz", "--calib-report", "--dry-run")
    made = command("quantize", "net.pt", "--target", "onnx", *options, cwd=tmp_path)
    assert made.code == 0, made.err
    assert "input input" in made.out
    assert "outliers" in made.out
    assert "looks like random numbers" in made.out
    assert command("quantize", "net.pt", *options, cwd=tmp_path).code == 2
