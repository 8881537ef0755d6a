"""What can be said about a training run; checked before anything is paid for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from qkit.errors import UsageError, nearest
from qkit.flows.train.tables import OPTIMIZERS, SCHEDULES

PRECISIONS = ("fp32", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb")


_WHOLE = ("epochs", "batch_size", "step_epochs", "accumulate", "seed", "patience")
_NUMBERS = ("lr", "weight_decay", "momentum", "warmup", "gamma", "clip", "save_seconds")


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    ``optimizer`` and ``schedule`` are keys of :data:`~qkit.flows.train.tables.OPTIMIZERS` and
    :data:`~qkit.flows.train.tables.SCHEDULES`; ``momentum`` is for ``sgd`` and ``rmsprop``,
    ``step_epochs`` and ``gamma`` for the schedule ``step``. The learning rate climbs to ``lr``
    during the first ``warmup`` epochs. ``batch_size`` samples go through the model at a time in
    each process, and the gradients of ``accumulate`` such batches make a step; with ``clip`` their
    norm is at most that. ``patience`` epochs without a better metric end the training. ``keep`` the
    weights of the ``best`` epoch (by the metric, if there are validation data) or of the ``last``.
    Every ``save_seconds`` a checkpoint is written between those at the end of each epoch.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    step_epochs: int = 10
    gamma: float = 0.1
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    seed: int = 0
    patience: int | None = None
    keep: str = "best"
    save_seconds: float = 60.0
    device: str | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for names, kind, word in (
            (_WHOLE, Integral, "an integer"),
            (_NUMBERS, Real, "a number (in YAML with a point: 1.0e-3, for 1e-3 is text)"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                    raise UsageError(f"{name} is {word}", got=repr(value))
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("step_epochs", 1),
                            ("patience", 1), ("warmup", 0), ("weight_decay", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN too
                raise UsageError(f"{name} is at least {least}", got=value)
        for name, above in (("lr", 0), ("gamma", 0), ("clip", 0)):
            value = getattr(self, name)
            if value is not None and not above < value < float("inf"):
                raise UsageError(f"{name} is more than {above}, and finite", got=value)
        known: tuple[tuple[str, Any], ...] = (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("keep", ("best", "last")),
            ("device", (None, "cpu")),
        )
        for name, values in known:
            if getattr(self, name) not in values:
                wanted = ", ".join(str(value) for value in values if value)
                raise UsageError(f"unknown {name}", got=repr(getattr(self, name)), wanted=wanted)
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise UsageError("unknown tracker", got=tracker, wanted=nearest(tracker, TRACKERS))

    def to_json(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self) | {"trackers": list(self.trackers)}

    def decisive(self) -> dict[str, Any]:
        """The options that a run cannot change and still give what it would have given."""
        free = ("patience", "save_seconds", "device", "trackers", "keep")
        return {name: value for name, value in self.to_json().items() if name not in free}
