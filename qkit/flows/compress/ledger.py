"""The ledger: what a model is and costs after each step, measured in the same way each time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qkit.errors import InputError
from qkit.flows.compress.given import Given
from qkit.flows.compress.kinds import Written
from qkit.flows.compute import multiply_adds
from qkit.flows.evaluate import eval_mode, for_dtype
from qkit.models import run
from qkit.nn import QLayer
from qkit.report import machine, measure, versions
from qkit.report.text import as_text

FORMAT = 1
LATENCY_SECONDS = 0.5


@dataclass(frozen=True)
class Row:
    """A model after ``step``: ``parameters`` (weights of quantized layers too, shared ones once),
    ``nonzeros`` of them, ``bytes`` on disk (all files that a deployment needs), multiply-adds of
    one call and its median ``latency_ms`` (where inputs are known), the ``metrics`` on the
    validation data (where there are some) and the ``seconds`` that the step took."""

    step: str
    parameters: int
    nonzeros: int
    bytes: int
    multiply_adds: int | None
    latency_ms: float | None
    metrics: dict[str, float]
    seconds: float


@dataclass
class Ledger:
    """The rows of a run, the first of the model as it was given; the versions and the machine."""

    recipe: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(default_factory=machine)

    def to_json(self) -> dict[str, Any]:
        """This ledger as plain data."""
        return {"format": FORMAT} | asdict(self)

    def dumps(self) -> str:
        """This ledger as JSON text."""
        return as_text(self.to_json())


def row_of(
    step: str,
    model: nn.Module,
    given: Given,
    size: int,
    seconds: float,
    written: Written | None = None,
) -> Row:
    """The row of ``model``, which takes ``size`` bytes on disk; latency and metrics are those of
    the file that a step has ``written``, in its runtime."""
    parameters, nonzeros = _counts(model)
    macs = None if given.inputs is None else multiply_adds(model, given.inputs)
    metrics: dict[str, float] = {}
    if written is None:
        latency, metrics = _latency(model, given), given.figures(model)
    else:
        latency = None
        try:
            latency = _latency(written.model, given)
            metrics = given.figures(written.model, written.size)
        except InputError as error:  # a program of one size of batches takes no other
            given.told(f"not measured in {written.report.verification['runtime']}: {error}")
    return Row(
        step,
        parameters,
        nonzeros,
        size,
        macs,
        latency,
        {name: round(value, 6) for name, value in metrics.items()},
        round(seconds, 3),
    )


def _latency(model: nn.Module, given: Given) -> float | None:
    """The median of the milliseconds of a call; None where no inputs are known."""
    if given.inputs is None:
        return None
    inputs = for_dtype(given.inputs, model)
    with eval_mode(model):
        times = measure({"": lambda: run(model, inputs)}, seconds=LATENCY_SECONDS)
    return round(times[""].median, 4)


def _counts(model: nn.Module) -> tuple[int, int]:
    """Parameters and how many of them are not zero."""
    seen: set[int] = set()
    total = nonzeros = 0
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, QLayer) and id(module.stored_weight) not in seen:
            seen.add(id(module.stored_weight))
            weight = module.weight
            total, nonzeros = total + weight.numel(), nonzeros + int(weight.count_nonzero())
        for parameter in own:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
                nonzeros += int(parameter.detach().count_nonzero())
    return total, nonzeros
