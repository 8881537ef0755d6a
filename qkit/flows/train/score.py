"""How good a model is on labelled data: the loss, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError, nearest
from qkit.flows.evaluate import eval_mode
from qkit.flows.train.samples import Batch, TrainData
from qkit.flows.train.tables import METRICS, known_loss, main_output
from qkit.models import resolve_callable

# A mean over a batch, of outputs and targets.
Score = Callable[[Tensor, Tensor], Tensor]
# The loss of whatever the model answers to a batch.
Objective = Callable[[Any, Batch], Tensor]
Metric = tuple[str, Score | None, bool]


def named(text: str) -> str | Score:
    """What a command or a recipe calls a loss or a metric: a name of the tables, or
    ``module:function`` of outputs and targets."""
    return resolve_callable(text) if ":" in text else text  # type: ignore[return-value]


def objective_of(loss: str | Score) -> Objective:
    """The loss ``loss`` of the model's main output, with the targets checked first.

    Raises :class:`~qkit.errors.UsageError` for an unknown name; the objective raises
    :class:`~qkit.errors.InputError` for targets that do not fit.
    """
    known = known_loss(loss) if isinstance(loss, str) else None

    def objective(output: Any, batch: Batch) -> Tensor:
        outputs, targets = main_output(output), needed(batch)
        check_targets(loss, outputs, batch)
        function: Any = loss if known is None else known.function
        return function(outputs.float(), targets)

    return objective


def check_targets(loss: str | Score, outputs: Tensor, batch: Batch) -> None:
    """Raise :class:`~qkit.errors.InputError` for targets that a loss by name does not take."""
    targets = needed(batch)
    problem = known_loss(loss).check(outputs, targets) if isinstance(loss, str) else None
    if problem is not None:
        raise InputError(
            f"the targets do not fit the loss {loss!r}: {problem}",
            where=batch.inputs.origin,
            got=f"{str(targets.dtype)[6:]} {tuple(targets.shape)}",
        )


def needed(batch: Batch) -> Tensor:
    """The targets of ``batch``, or :class:`~qkit.errors.InputError` if there are none."""
    if batch.targets is None:
        raise InputError(
            "the training data have no targets",
            where=batch.inputs.origin,
            wanted="batches (inputs, targets)",
        )
    return batch.targets


def metric_of(metric: str | Score | None, loss: str | Score) -> Metric:
    """The name of a metric, what computes it (None: it is the loss), and whether more is better.

    Without one, it is the one that goes with the loss. Raises :class:`~qkit.errors.UsageError`.
    """
    if metric is None:
        metric = known_loss(loss).metric if isinstance(loss, str) else "loss"
    if metric == "loss":
        return "loss", None, False
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UsageError("unknown metric", got=metric, wanted=nearest(metric, METRICS))
        return metric, *METRICS[metric]
    return getattr(metric, "__name__", "metric"), metric, True


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: TrainData,
    *,
    loss: str | Score = "cross-entropy",
    objective: Objective | None = None,
    metric: str | Score | None = None,
    batch_size: int = 256,
    device: torch.device | None = None,
) -> dict[str, float]:
    """The means of the loss and of the metric over ``data``, in eval mode.

    Raises :class:`~qkit.errors.InputError` for data that do not fit.
    """
    objective = objective or objective_of(loss)
    name, score, _ = metric_of(metric, loss)
    sums, samples = {"loss": 0.0}, 0
    with eval_mode(model):
        for given in data.epoch(0, 0, batch_size, shuffle=False):
            batch = given if device is None else given.to(device)
            output = model(*batch.inputs.args, **batch.inputs.kwargs)
            found = {"loss": objective(output, batch)}
            if score is not None:
                found[name] = score(main_output(output), needed(batch))
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + float(value) * len(batch)
            samples += len(batch)
    return {key: value / samples for key, value in sums.items()}


def scores(
    models: Mapping[str, nn.Module],
    data: TrainData,
    *,
    loss: str | Score,
    metric: str | Score | None,
) -> dict[str, dict[str, float]]:
    """Each figure of :func:`evaluate` for each of ``models``, rounded for a report."""
    found = {n: evaluate(m, data, loss=loss, metric=metric) for n, m in models.items()}
    keys = next(iter(found.values()))
    return {key: {n: round(each[key], 4) for n, each in found.items()} for key in keys}
