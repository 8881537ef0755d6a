"""Iterative pruning: remove a little, train a little, look, and stop at the last good step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from qkit.errors import BudgetError, QkitError, UsageError
from qkit.flows.evaluate import AnyInputs, as_inputs, eval_mode, few, fill_cost
from qkit.flows.prune import fill_error, fill_speed, prune
from qkit.flows.sparsify import Amount, sparsify
from qkit.models import infer, run
from qkit.pruning.masks import Masks
from qkit.pruning.plan import check_amount
from qkit.report.pruning import PruneReport

# How much of the amount is removed after the share t of the steps: evenly; fast while there is
# much that nobody misses (Zhu and Gupta 2017); or the same share of what is left each time.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, amount: amount * t,
    "cubic": lambda t, amount: amount * (1 - (1 - t) ** 3),
    "geometric": lambda t, amount: 1 - (1 - amount) ** t,
}
_UNITS = ("macs", "params", "bytes")
Tune = Callable[[nn.Module], object]
Evaluate = Callable[[nn.Module], float]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Steps:
    """In how many ``steps``, by which ``schedule`` (:data:`SCHEDULES`), and what is good enough: a
    metric of at least ``floor``, or at most ``drop`` below that of the start."""

    steps: int = 5
    schedule: str = "geometric"
    drop: float | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if not whole or self.steps < 1 or self.schedule not in SCHEDULES:
            raise UsageError(
                "no such schedule",
                got=f"{self.steps} steps, {self.schedule}",
                wanted=f"1 step or more, {', '.join(SCHEDULES)}",
            )
        for name, value in (("drop", self.drop), ("floor", self.floor)):
            if value is not None and (not isinstance(value, int | float) or value != value):
                raise UsageError(f"{name} is a number of the metric", got=repr(value))
        if self.drop is not None and self.drop < 0:
            raise UsageError("a drop is 0 or more below the metric of the start", got=self.drop)
        if self.drop is not None and self.floor is not None:
            raise UsageError("give drop or floor, not both")

    def goal(self, step: int, amount: float) -> float:
        """The share that is removed after ``step``, of ``amount`` in all."""
        return SCHEDULES[self.schedule](step / self.steps, amount)

    def least(self, at_start: float) -> float | None:
        """What the metric must be."""
        return self.floor if self.drop is None else at_start - self.drop


@dataclass(frozen=True)
class Followed:
    """The ``model`` after the last good step, how many of them removed something, the ``least``
    metric that was asked for, and a row of the ``history`` for each step."""

    model: nn.Module
    good: int
    least: float | None
    history: list[dict[str, Any]]


def follow(
    model: nn.Module,
    how: Steps,
    remove: Callable[[nn.Module, int], tuple[nn.Module, float] | None],
    *,
    tune: Tune,
    evaluate: Evaluate,
    told: Told,
) -> Followed:
    """``remove(model, step)`` a growing share of what there was at the start, ``tune`` what comes
    out, ``evaluate`` it, until a step is not good or cannot be made.

    ``remove`` gives the smaller model and the share that is gone; None where as much was gone
    before. Raises :class:`~qkit.errors.BudgetError` if not even the first step is good.
    """
    with eval_mode(model):
        at_start = float(evaluate(model))
    least, good, metric = how.least(at_start), 0, at_start
    history: list[dict[str, Any]] = [{"step": 0, "removed": 0.0, "metric": at_start, "good": True}]
    for step in range(1, how.steps + 1):
        try:
            made = remove(model, step)
        except QkitError as error:
            if not good:
                raise
            history.append({"step": step, "good": False, "reason": error.problem})
            break
        if made is None:  # rounding went further than this already
            continue
        smaller, removed = made
        tune(smaller)
        smaller.eval()
        metric = float(evaluate(smaller))
        is_good = least is None or metric >= least
        history.append({"step": step, "removed": removed, "metric": metric, "good": is_good})
        told(f"step {step}: {removed:.1%} removed, metric {metric:g}")
        if not is_good:
            break
        model, good = smaller, good + 1
    if not good:
        raise BudgetError(
            "the model is not good enough even after the first step",
            got=metric,
            wanted=f"at least {least}",
            fix="more steps, a longer tune, a smaller amount, or a lower floor",
        )
    return Followed(model, good, least, history)


def prune_iteratively(
    model: nn.Module,
    inputs: AnyInputs | None = None,
    *,
    tune: Tune,
    evaluate: Evaluate,
    amount: float = 0.8,
    steps: int = 5,
    schedule: str = "geometric",
    drop: float | None = None,
    floor: float | None = None,
    unit: str = "macs",
    latency: bool = True,
    told: Told = lambda text: None,
    **options: Any,
) -> tuple[nn.Module, PruneReport]:
    """Prune ``model`` in ``steps``, and train it after each: ``tune(model)``, in place.

    A step is good if ``evaluate(model)`` (more is better) is at least ``floor``, or at most
    ``drop`` below what it was at the start. At the first step that is not, or that cannot remove
    any more, the model of the step before is what comes out. ``options`` are those of
    :func:`qkit.prune`. The report's ``history`` has a row for each step; its ``before`` is the
    model that was given, which is not changed.

    >>> def tune(model):  # doctest: +SKIP
    ...     train(model, data, options=TrainOptions(epochs=3))

    Raises what :func:`qkit.prune` raises, and :class:`~qkit.errors.BudgetError` if even the first
    step is not good.
    """
    start = time.perf_counter()
    check_amount(amount)
    how = Steps(steps, schedule, drop, floor)
    check_unit(unit)
    given = infer(model) if inputs is None else as_inputs(inputs)
    if given is None:
        raise UsageError("no inputs are known to trace the model with", fix="inputs=")
    reports: list[PruneReport] = []

    def remove(good: nn.Module, step: int) -> tuple[nn.Module, float] | None:
        share = goal = how.goal(step, amount)
        if reports:
            share = 1 - (1 - goal) * reports[0].before[unit] / reports[-1].after[unit]
        if share <= 0:
            return None
        smaller, found = prune(good, given, amount=share, unit=unit, latency=False, **options)
        reports.append(found)
        return smaller, round(1 - found.after[unit] / reports[0].before[unit], 4)

    done = follow(model, how, remove, tune=tune, evaluate=evaluate, told=told)
    report = reduce(_since, reports[: done.good])
    report.history = done.history
    report.scheme = f"pruned {amount:g} of {unit} in {steps} steps"
    report.recipe["steps"][0]["prune"] |= {
        "amount": amount, "steps": steps, "schedule": schedule, "floor": done.least,
    }  # fmt: skip
    sample = few(given)
    assert sample is not None
    with eval_mode(model):
        fill_error(report, run(model, sample), done.model, sample)
        if latency:
            fill_speed(report, model, done.model, sample)
    fill_cost(report, start)
    return done.model, report


def check_unit(unit: str) -> None:
    """Raise :class:`~qkit.errors.UsageError` for a unit that steps cannot be taken by."""
    if unit not in _UNITS:
        raise UsageError(
            "steps are by what can be counted", got=repr(unit), wanted=", ".join(_UNITS)
        )


def check_share(amount: Amount) -> None:
    """Raise :class:`~qkit.errors.UsageError` for what zeros cannot be added towards in steps."""
    for each in amount.values() if isinstance(amount, Mapping) else [amount]:
        if isinstance(each, str):
            raise UsageError("steps go towards a share of the weights, not a pattern", got=each)
        check_amount(each)


def _since(first: PruneReport, last: PruneReport) -> PruneReport:
    """``last``, counted from what the ``first`` one began with."""
    last.before = first.before
    last.ratio = {k: round(last.after[k] / max(first.before[k], 1), 4) for k in last.before}
    last.remarks = list(dict.fromkeys([*first.remarks, *last.remarks]))
    last.size_bytes = first.size_bytes
    units = {row.name: row.units for row in first.groups}
    last.groups = [
        type(row)(row.name, units.get(row.name, row.units), row.kept, row.rows)
        for row in last.groups
    ]
    return last


def sparsify_iteratively(
    model: nn.Module,
    amount: Amount = 0.9,
    *,
    tune: Tune,
    evaluate: Evaluate,
    steps: int = 5,
    schedule: str = "cubic",
    drop: float | None = None,
    floor: float | None = None,
    told: Told = lambda text: None,
    **options: Any,
) -> tuple[nn.Module, Masks, list[dict[str, Any]]]:
    """:func:`qkit.sparsify` in ``steps``, with ``tune(model)`` after each, while which the zeros
    are held (Han et al. 2015; the schedule of Zhu and Gupta 2017, arXiv 1710.01878).

    What is good, and where it stops, is said at :func:`prune_iteratively`; ``options`` are those of
    :func:`qkit.sparsify`. Returns the model, its masks and the history.
    """
    check_share(amount)
    how = Steps(steps, schedule, drop, floor)
    found: list[Masks] = []

    def goal(step: int) -> Amount:
        if not isinstance(amount, Mapping):
            return how.goal(step, float(amount))
        return {name: how.goal(step, float(each)) for name, each in amount.items()}

    def remove(good: nn.Module, step: int) -> tuple[nn.Module, float]:
        smaller, masks = sparsify(good, goal(step), **options)
        found.append(masks)
        return smaller, round(1 - masks.density, 4)

    def held(smaller: nn.Module) -> None:
        with found[-1].hold(smaller):
            tune(smaller)

    done = follow(model, how, remove, tune=held, evaluate=evaluate, told=told)
    return done.model, found[done.good - 1], done.history
