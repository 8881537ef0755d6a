"""Contenders that do what contenders do, good and bad; fresh processes import them by name."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn


class Sleepy(nn.Module):
    """A layer behind a sleep of some milliseconds, give or take ``spread`` of it."""

    def __init__(self, milliseconds: float, spread: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 5)
        self.milliseconds, self.spread = milliseconds, spread

    def forward(self, x: Tensor) -> Tensor:
        more = self.spread * (2 * torch.rand(()).item() - 1)
        time.sleep(self.milliseconds * (1 + more) / 1e3)
        return self.layer(x)


class OnlyOne(Sleepy):
    """Takes one sample at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one sample, please")
        return super().forward(x)


class Ends(Sleepy):
    """Ends its process at the seventh call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 7:
            print("out of patience", file=__import__("sys").stderr)
            os._exit(9)
        return super().forward(x)


class Twice(Sleepy):
    """Has an output more."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = super().forward(x)
        return found, found


def total(run) -> float:
    """A metric: the sum of the outputs for ones."""
    found = run(torch.ones(2, 12))
    return float((found if isinstance(found, Tensor) else found[0]).sum())


def nowhere(run) -> float:
    """A metric of nothing."""
    return float("nan")
