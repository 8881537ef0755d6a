"""Whether a model, its data and a loss go together: found out before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.flows.evaluate import eval_mode
from qkit.flows.train.samples import TrainData, stream_of
from qkit.flows.train.score import Objective, Score, check_targets
from qkit.flows.train.tables import main_output
from qkit.models import run

SAMPLES_CHECKED = 2


def as_train_data(data: TrainData | Iterable[Any]) -> TrainData:
    """``data``, if it can be gone through again and again."""
    if isinstance(data, TrainData):
        return data
    if isinstance(data, Iterator):
        raise UsageError(
            "an iterator can be used once only, and an epoch is a pass over the data",
            got=type(data).__name__,
            fix="give a list or a DataLoader, or stream_of(function that makes the iterator, name)",
        )
    return stream_of(lambda: data, "given by the caller")


def check_data(
    model: nn.Module, data: TrainData, objective: Objective, loss: str | Score | None
) -> None:
    """Run the first samples, so that what does not fit is said before anything is paid for; with
    the ``loss`` behind the objective, the targets of all that is in memory are looked at too.

    Raises :class:`~qkit.errors.InputError`.
    """
    first = next(data.epoch(0, 0, SAMPLES_CHECKED, shuffle=False))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = first.part(slice(SAMPLES_CHECKED)).to(device)
    with eval_mode(model), torch.no_grad():
        run(model, batch.inputs)  # with a clear error
        output = model(*batch.inputs.args, **batch.inputs.kwargs)
        value = objective(output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(
            "the loss is not one number", where=data.origin, got=getattr(value, "shape", value)
        )
    if data.in_memory and loss is not None:
        _check_all(data, output, loss)


def check_classes(data: TrainData, val: TrainData) -> None:
    """Raise :class:`~qkit.errors.InputError` where equal targets mean other classes."""
    if data.classes and val.classes and data.classes != val.classes:
        raise InputError(
            "the validation data have other classes than the training data",
            where=val.origin,
            got=", ".join(val.classes[:10]),
            wanted=", ".join(data.classes[:10]),
        )


def _check_all(data: TrainData, output: Any, loss: str | Score) -> None:
    """The targets of all samples in memory against the output of the first ones."""
    outputs = main_output(output)
    for whole in data.epoch(0, 0, data.samples or 1, shuffle=False):
        check_targets(loss, outputs[:1].expand(len(whole), *outputs.shape[1:]), whole)
