"""What a teacher adds to labels: ``python benchmarks/compression.py --case distill``.

Soft targets as regularizers (Hinton et al. 2015, arXiv 1503.02531, section 6), on scikit-learn's
8x8 digits: the demo's CNN learns from all training images, a student with a tenth of its
parameters from a fifth of them, with their labels alone (``accuracy_plain``) and with the teacher's
answers to the same images too (``accuracy_distilled``): the same weights to start from, the same
batches, the same number of steps. ``gain`` is the difference in points of the test images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkit.flows.demo import Digits, accuracy, digits_cnn
from qkit.flows.distill import Teaching, distill
from qkit.flows.train import TrainOptions, labelled, stream_of, train

IMAGES = 270  # of 1347
TEACHING = Teaching(weight=0.9, temperature=2.0)


def student() -> nn.Sequential:
    """17,730 parameters, where the teacher has 188,362."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def shifted(data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of the training images, each batch moved by up to a pixel."""
    for indices in torch.randperm(len(data.train_x)).split(64):
        by = torch.randint(-1, 2, (2,)).tolist()
        yield torch.roll(data.train_x[indices], by, (2, 3)), data.train_y[indices]


def teacher(data: Digits, epochs: int) -> nn.Module:
    """The demo's CNN, trained on shifted images."""
    torch.manual_seed(0)
    model = digits_cnn()
    options = TrainOptions(epochs=epochs, lr=2e-3, keep="last")
    train(model, stream_of(lambda: shifted(data), "shifted digits"), options=options)
    return model


def records(data: Digits, seeds: int, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One record for each seed, and one with the mean of their gains and its spread."""
    large = teacher(data, 1 if quick else 15)
    count = sum(p.numel() for p in large.parameters())
    gains = []
    for seed in range(seeds):
        order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
        few = labelled(data.train_x[order[:IMAGES]], data.train_y[order[:IMAGES]])
        options = TrainOptions(
            epochs=1 if quick else 60, lr=4e-3, batch_size=32, keep="last", seed=seed
        )
        scores = []
        for taught in (False, True):
            torch.manual_seed(seed)
            small = student()
            if taught:
                distill(small, large, few, teaching=TEACHING, options=options)
            else:
                train(small, few, options=options)
            scores.append(accuracy(small, data))
        gains.append(scores[1] - scores[0])
        yield {
            "seed": seed,
            "accuracy_teacher": accuracy(large, data),
            "accuracy_plain": scores[0],
            "accuracy_distilled": scores[1],
            "gain": round(gains[-1], 3),
            "size": round(sum(p.numel() for p in small.parameters()) / count, 4),
        }
    spread = torch.tensor(gains)
    yield {
        "seeds": seeds,
        "mean_gain": round(float(spread.mean()), 3),
        "least_gain": round(float(spread.min()), 3),
        "deviation": round(float(spread.std(correction=0)), 3),
    }
