"""Optimizers, schedules, losses and metrics by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.errors import InputError, UsageError, nearest
from qkit.models.inputs import flatten

if TYPE_CHECKING:
    from qkit.flows.train.options import TrainOptions

Parameters = Iterable[Tensor]

OPTIMIZERS: dict[str, Callable[[Parameters, TrainOptions], torch.optim.Optimizer]] = {
    "sgd": lambda p, o: torch.optim.SGD(
        p, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.momentum > 0
    ),
    "adam": lambda p, o: torch.optim.Adam(p, o.lr, weight_decay=o.weight_decay),
    "adamw": lambda p, o: torch.optim.AdamW(p, o.lr, weight_decay=o.weight_decay),
    "rmsprop": lambda p, o: torch.optim.RMSprop(
        p, o.lr, momentum=o.momentum, weight_decay=o.weight_decay
    ),
}

# The factor of the learning rate after ``t`` of the training (0 to 1, without the warm-up) and
# ``epoch`` whole epochs: functions of the place alone, so a resumed run has nothing to restore.
SCHEDULES: dict[str, Callable[[float, int, TrainOptions], float]] = {
    "constant": lambda t, epoch, o: 1.0,
    "cosine": lambda t, epoch, o: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t, epoch, o: 1 - t,
    "step": lambda t, epoch, o: o.gamma ** (epoch // o.step_epochs),
}


def learning_rate(options: TrainOptions, epoch: int, done: float, step: float) -> float:
    """The rate of the step that starts after the share ``done`` of ``epoch`` and takes ``step``."""
    place = epoch + done
    if place + step < options.warmup:
        return options.lr * (place + step) / options.warmup
    left = max(options.epochs - options.warmup, 1e-9)
    t = min(max((place - options.warmup) / left, 0.0), 1.0)
    return options.lr * SCHEDULES[options.schedule](t, epoch, options)


@dataclass(frozen=True)
class Loss:
    """A loss by name: the mean over a batch, and ``check``, which says why targets do not fit the
    outputs (None: they do)."""

    function: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[Tensor, Tensor], str | None]
    metric: str


def main_output(output: Any) -> Tensor:
    """The tensor of an output that is trained: the ``logits`` of one that has some, else the first.

    Raises :class:`~qkit.errors.InputError` if there is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else next(flatten(output), None)
    if found is None:
        raise InputError("the model returned no tensor", got=type(output).__name__)
    return found


def _classes(outputs: Tensor, targets: Tensor) -> str | None:
    """Class numbers ``[n, ...]`` for ``[n, classes, ...]``, or probabilities of its shape."""
    if targets.is_floating_point():
        same = targets.shape == outputs.shape
        return None if same else f"probabilities have the outputs' shape {tuple(outputs.shape)}"
    wanted = (outputs.shape[0], *outputs.shape[2:])
    if outputs.dim() < 2 or tuple(targets.shape) != wanted:
        return f"class numbers have the shape {wanted}, for outputs {tuple(outputs.shape)}"
    known = targets[targets != IGNORED]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < outputs.shape[1]:
        return f"class numbers are 0 to {outputs.shape[1] - 1}: found {int(known.min())} to " + (
            f"{int(known.max())}"
        )
    return None


def _tokens(outputs: Tensor, targets: Tensor) -> str | None:
    if outputs.dim() != 3 or outputs.shape[:2] != targets.shape or targets.is_floating_point():
        return f"token numbers have the shape [batch, length] of outputs {tuple(outputs.shape)}"
    return _classes(outputs.transpose(1, 2), targets)


def _same(outputs: Tensor, targets: Tensor) -> str | None:
    if not targets.is_floating_point():
        return "values are floats"
    same = targets.shape == outputs.shape
    return None if same else f"values have the outputs' shape {tuple(outputs.shape)}"


# What torch's losses leave out.
IGNORED = -100


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token given those before it; targets of -100 do not count."""
    logits, wanted = outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    return F.cross_entropy(logits, wanted, ignore_index=IGNORED)


LOSSES: dict[str, Loss] = {
    "cross-entropy": Loss(F.cross_entropy, _classes, "accuracy"),
    "next-token": Loss(next_token, _tokens, "loss"),
    "mse": Loss(F.mse_loss, _same, "loss"),
    "l1": Loss(F.l1_loss, _same, "loss"),
    "huber": Loss(F.smooth_l1_loss, _same, "loss"),
    "bce": Loss(F.binary_cross_entropy_with_logits, _same, "loss"),
}


def known_loss(name: str) -> Loss:
    """The loss ``name``, or :class:`~qkit.errors.UsageError`."""
    if name not in LOSSES:
        raise UsageError("unknown loss", got=repr(name), wanted=nearest(name, LOSSES, len(LOSSES)))
    return LOSSES[name]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of right classes, in percent."""
    right = targets.argmax(1) if targets.is_floating_point() else targets
    return 100 * (outputs.argmax(1) == right).float().mean()


# The mean over a batch, and whether more is better.
METRICS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "accuracy": (accuracy, True),
    "mse": (F.mse_loss, False),
    "l1": (F.l1_loss, False),
}
