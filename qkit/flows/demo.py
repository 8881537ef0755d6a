"""``qkit demo``: train a small model on real data, then quantize it with the public commands."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qkit.errors import MissingExtraError
from qkit.targets.staging import as_output_error, write_whole

CALIBRATION = 256  # images


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 handwritten digits: images ``[n, 1, 8, 8]`` in [0, 1] and labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """The digits, 1347 for training and 450 for testing, shuffled with a fixed seed.

    Raises :class:`~qkit.errors.MissingExtraError` if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", needed_for="the demo") from error
    x, y = sklearn_digits(return_X_y=True)
    split = train_test_split(x / 16.0, y, test_size=450, random_state=0, stratify=y)
    train_x, test_x = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 8, 8) for v in split[:2])
    train_y, test_y = (torch.tensor(v) for v in split[2:])
    return Digits(train_x, train_y, test_x, test_y)


def digits_cnn() -> nn.Sequential:
    """A convolutional network for 8x8 images, of plain ``torch.nn`` layers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, data: Digits, *, epochs: int = 8, seed: int = 0) -> None:
    """Train ``model`` in place: Adam, cosine schedule, cross-entropy; seconds on two cores."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of test images that ``model`` classifies rightly, in percent."""
    x = data.test_x.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    with torch.no_grad():
        right = model(x).argmax(1) == data.test_y
    return round(100 * float(right.float().mean()), 3)


def prepare(folder: Path, *, seed: int = 0) -> tuple[Path, Path, Digits]:
    """Train the model; write ``digits.pt`` (a pickled module) and ``digits-calib.npz``.

    The calibration images are training images: the test images are for the accuracy alone.

    Raises :class:`~qkit.errors.OutputError` if ``folder`` cannot be written, and
    :class:`~qkit.errors.MissingExtraError` if scikit-learn is not installed.
    """
    data = load_digits()
    with as_output_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = digits_cnn()
    train(model, data, seed=seed)
    model_path, data_path = folder / "digits.pt", folder / "digits-calib.npz"
    model_file, data_file = io.BytesIO(), io.BytesIO()
    torch.save(model, model_file)
    np.savez(data_file, input=data.train_x[:CALIBRATION].numpy())
    with as_output_error(folder):
        write_whole(model_path, model_file.getvalue())
        write_whole(data_path, data_file.getvalue())
    return model_path, data_path, data
