"""What the steps of a recipe have to work with, and how they train and judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkit.distill.match import listening
from qkit.errors import UsageError
from qkit.flows.distill import Teaching, distill
from qkit.flows.distill_file import TEMPERATURE, matches_of
from qkit.flows.quantize import resolve_recipe
from qkit.flows.train import TrainData, TrainOptions, evaluate, train
from qkit.flows.train.checkpoint import LAST
from qkit.flows.train.score import Score, metric_of, named, objective_of
from qkit.models import Inputs
from qkit.pruning.masks import Masks
from qkit.spec.plain import show

Options = dict[str, Any]
# Gradients that tell what matters are those of so many batches of the training data.
GRADIENT_BATCHES, GRADIENT_SAMPLES = 4, 64
_OWN = ("seed", "trackers")
# How a training listens to the model as it was before the first step; without ``teacher``, the
# weight of its answers, not at all.
TEACHING: Options = {
    "teacher": None,
    "temperature": TEMPERATURE,
    "match": [],
    "teacher_precision": None,
}


def silent(text: str) -> None:
    """Say nothing."""


def nowhere() -> None:
    """No folder for checkpoints."""


@dataclass(frozen=True)
class Given:
    """What the steps of one run have: ``inputs`` to trace and compare on, ``calib`` (the same, but
    real) to learn from, labelled ``data`` to train and score with, where there are some, and the
    ``teacher``: the model as it was before the first step. ``loss`` and ``metric`` are names, or
    ``module:function``. ``scratch()`` is a folder for the checkpoints of the next training of a
    step, where a run that is killed goes on, or None."""

    inputs: Inputs | None
    calib: Inputs | None = None
    data: TrainData | None = None
    val: TrainData | None = None
    seed: int = 0
    loss: str = "cross-entropy"
    metric: str | None = None
    teacher: nn.Module | None = None
    told: Callable[[str], None] = silent
    scratch: Callable[[], Path | None] = nowhere

    def checkpoints(self) -> dict[str, Any]:
        """Where the next training keeps its checkpoints, and whether there are some."""
        folder = self.scratch()
        return {"folder": folder, "resume": folder is not None and (folder / LAST).exists()}

    @property
    def scored(self) -> dict[str, str | Score | None]:
        """Loss and metric as :func:`~qkit.flows.train.train` takes them."""
        return {"loss": named(self.loss), "metric": self.metric and named(self.metric)}

    def figures(self, model: nn.Module, batch_size: int = 256) -> dict[str, float]:
        """Loss and metric of ``model`` on the validation data; none where there are none."""
        if self.val is None:
            return {}
        scored: Any = self.scored
        return evaluate(model, self.val, batch_size=batch_size, **scored)

    def goodness(self) -> tuple[Callable[[nn.Module], float], int]:
        """The metric of a model, on the validation data or else the training data, as a function
        of which more is better, and its sign (-1: it is a metric of which less is)."""
        scored: Any = self.scored
        name, _, larger = metric_of(scored["metric"], scored["loss"])
        judged, sign = self.val or self.data, 1 if larger else -1
        assert judged is not None
        return (lambda model: sign * evaluate(model, judged, **scored)[name]), sign

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss of ``model`` on a few batches of the training data."""
        assert self.data is not None
        objective = objective_of(named(self.loss))
        stream = self.data.epoch(0, self.seed, GRADIENT_SAMPLES, shuffle=True)
        for batch in islice(stream, GRADIENT_BATCHES):
            yield objective(model(*batch.inputs.args, **batch.inputs.kwargs), batch)

    def total_loss(self, model: nn.Module) -> Tensor:
        """Their sum."""
        first, *rest = self.losses(model)
        return sum(rest, start=first)

    def fit(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """Train ``model`` in place, by the options of a recipe, with a ``teacher`` where they name
        one; what is zero stays so."""
        assert self.data is not None
        own, chosen = _parted(options)
        how: dict[str, Any] = {"val": self.val, "options": train_options(chosen, self.seed)}
        how |= {"told": self.told, **self.scored, **self.checkpoints()}
        with Masks.of(model).hold(model):
            if own["teacher"] is None:
                train(model, self.data, **how)
                return
            assert self.teacher is not None
            teaching = Teaching(
                own["teacher"],
                own["temperature"],
                matches_of(own["match"], model, self.teacher),
                own["teacher_precision"],
            )
            distill(model, self.teacher, self.data, teaching=teaching, **how)


def train_options(options: Mapping[str, Any], seed: int = 0) -> TrainOptions:
    """The options of a training run that a recipe gives."""
    known = {field.name for field in fields(TrainOptions)} - set(_OWN)
    if unknown := set(options) - known:
        raise UsageError(
            "unknown option of training",
            got=", ".join(sorted(unknown)),
            wanted=", ".join(sorted(known)),
        )
    with typed("train"):
        return TrainOptions(**options, seed=seed)


def training_defaults(**changed: Any) -> Options:
    """The options of a step that trains, with their values."""
    return {f.name: f.default for f in fields(TrainOptions) if f.name not in _OWN} | changed


def training_part(options: Mapping[str, Any]) -> Options:
    """Of the options of a step, those of its training."""
    return {name: value for name, value in options.items() if name in training_defaults()}


def check_nested(step: str, options: Mapping[str, Any]) -> None:
    """Check the options of training in the option ``train`` of a step, where it is there."""
    if (given := options["train"]) is None:
        return
    if not isinstance(given, dict):
        raise UsageError(f"train of {step!r} has options of its own", got=repr(given))
    check_learning(step, given)


def check_learning(step: str, options: Mapping[str, Any]) -> None:
    """Check what a training listens to, and the rest of its options."""
    own, chosen = _parted(options)
    if own["teacher"] is not None:
        with typed(step):
            Teaching(own["teacher"], own["temperature"])
    elif changed := [name for name in TEACHING if own[name] != TEACHING[name]]:
        raise UsageError(
            f"the option {changed[0]!r} in {step!r} is for a training with a teacher",
            fix="teacher: 0.5, the weight of its answers",
        )
    match = own["match"]
    if not isinstance(match, list) or not all(isinstance(each, str) for each in match):
        raise UsageError(f"match of {step!r} is a list of texts", got=show(match))
    if own["teacher_precision"] is not None:
        resolve_recipe(own["teacher_precision"])
    train_options(chosen)


def _parted(options: Mapping[str, Any]) -> tuple[Options, Options]:
    """What a training listens to, and the rest of its options."""
    own = {name: options.get(name, default) for name, default in TEACHING.items()}
    return own, {name: value for name, value in options.items() if name not in TEACHING}


def matches_fit(texts: Sequence[str], student: nn.Module, teacher: nn.Module) -> None:
    """Raise :class:`~qkit.errors.UsageError` for features that student or teacher does not have."""
    for match in matches_of(texts, student, teacher):
        for side, name in ((student, match.student), (teacher, match.teacher)):
            with listening(side, [name]):
                pass


@contextmanager
def typed(step: str) -> Iterator[None]:
    """A value of another type (an epoch count that is a word, say) is a wrong request."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"an option of the step {step!r} has another type: {error}") from error
