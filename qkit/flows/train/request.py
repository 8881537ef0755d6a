"""What the command line says of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from qkit.flows.train.options import TrainOptions
from qkit.flows.train.samples import TrainData
from qkit.flows.train.score import Score, named
from qkit.flows.train.sources import open_train


@dataclass(frozen=True)
class TrainRequest:
    """The options of a command that trains: ``train`` and ``val`` name the data
    (:func:`~qkit.flows.train.sources.open_train`), ``checkpoints`` the folder of the run (None: one
    beside the output)."""

    train: str
    val: str | None = None
    options: TrainOptions = field(default_factory=TrainOptions)
    loss: str = "cross-entropy"
    metric: str | None = None
    image: tuple[str, ...] = ()
    checkpoints: str | None = None
    resume: bool = False
    teacher: float | None = None
    temperature: float = 2.0
    freeze_ranges: int | None = None
    freeze_norms: int | None = None
    lsq: bool = False

    @property
    def scored(self) -> dict[str, str | Score | None]:
        """The loss and the metric as :func:`~qkit.flows.train.loop.train` takes them.

        Raises :class:`~qkit.errors.UsageError` for a function that cannot be found.
        """
        metric = None if self.metric is None else named(self.metric)
        return {"loss": named(self.loss), "metric": metric}

    def folder(self, output: Path) -> Path:
        """Where the run keeps its checkpoints, for the artifact ``output``."""
        return Path(self.checkpoints or f"{output}-training")

    def data(self, model: nn.Module | None) -> tuple[TrainData, TrainData | None]:
        """The training data, and the validation data if there are any."""
        val = None if self.val is None else open_train(self.val, model, self.image)
        return open_train(self.train, model, self.image), val
