"""The options of the commands that train, and what they say to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from qkit.cli.common import options

if TYPE_CHECKING:
    from qkit.flows.train import TrainRequest

_OPTIONS = (
    ("epochs", int, "Passes over the training data."),
    ("batch_size", int, "Samples of a batch, in each process."),
    ("optimizer", str, "sgd, adam, adamw or rmsprop."),
    ("lr", float, "The learning rate."),
    ("weight_decay", float, "The weight decay."),
    ("momentum", float, "Of sgd and rmsprop."),
    ("schedule", str, "Of the learning rate: constant, cosine, linear or step."),
    ("warmup", float, "Epochs in which the learning rate climbs."),
    ("step_epochs", int, "Epochs of a step of --schedule step."),
    ("gamma", float, "What such a step multiplies the learning rate by."),
    ("clip", float, "Largest norm of the gradients."),
    ("accumulate", int, "Batches whose gradients make a step."),
    ("precision", str, "fp32, bf16 or fp16 (mixed)."),
    ("patience", int, "Stop after that many epochs without a better metric."),
    ("keep", str, "The weights of the best epoch, or of the last."),
    ("save_seconds", float, "Seconds between checkpoints in the middle of an epoch."),
    ("device", str, "cpu: train there, although there is a GPU."),
)
_NAMES = (
    *("train", "val", "loss", "metric", "checkpoints", "trackers"),
    *("teacher", "temperature", "freeze_ranges", "freeze_norms", "lsq"),
)


def _option(name: str, kind: type, text: str) -> Any:
    return click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)


training_options = options(
    click.option(
        "--train",
        metavar="DATA",
        help="Data to train with: FILE.npz with the inputs and an array called labels, a folder "
        "with a folder of pictures for each class, or MODULE:FUNCTION, which returns batches "
        "(inputs, labels).",
    ),
    click.option("--val", metavar="DATA", help="Data to choose the best epoch by, like --train."),
    click.option(
        "--loss",
        default="cross-entropy",
        show_default=True,
        help="cross-entropy, next-token, mse, l1, huber or bce; or MODULE:FUNCTION of outputs "
        "and targets.",
    ),
    click.option("--metric", help="accuracy, mse, l1 or loss [what goes with the loss]."),
    click.option("--checkpoints", type=click.Path(), metavar="FOLDER", help="[OUTPUT-training]."),
    click.option(
        "--tracker",
        "trackers",
        multiple=True,
        metavar="NAME",
        help="Also report to tensorboard or wandb. Repeatable.",
    ),
    *(_option(*each) for each in _OPTIONS),
)


def training_request(
    given: dict[str, Any], *, resume: bool, seed: int, defaults: dict[str, Any]
) -> TrainRequest | None:
    """The request of the training options in ``given``, which are taken out; None without --train.

    ``defaults`` are those of the command. Raises :class:`~qkit.errors.UsageError` for options of
    training without --train.
    """
    from qkit.errors import UsageError

    said = {name: given.pop(name) for name, _, _ in _OPTIONS}
    rest = {name: given.pop(name) for name in _NAMES if name in given}
    said = {name: value for name, value in said.items() if value is not None}
    if rest["train"] is None:
        others = ("val", "metric", "checkpoints", "teacher")
        wrong = [*said, *(name for name in others if rest.get(name) is not None)]
        if wrong:
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise UsageError("an option of training, without data", got=shown, fix="--train DATA")
        return None
    from qkit.flows.train import TrainOptions, TrainRequest

    trackers, image = tuple(rest.pop("trackers")), tuple(given.get("image", ()))
    how = TrainOptions(**defaults | said, seed=seed, trackers=trackers)
    return TrainRequest(options=how, resume=resume, image=image, **rest)
