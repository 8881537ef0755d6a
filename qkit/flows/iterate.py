"""Iterative pruning: remove a little, train a little, look, and stop at the last good step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from qkit.errors import BudgetError, QkitError, UsageError
from qkit.flows.evaluate import AnyInputs, as_inputs, eval_mode, few, fill_cost
from qkit.flows.prune import fill_error, fill_speed, prune
from qkit.models import infer, run
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


def prune_iteratively(
    model: nn.Module,
    inputs: AnyInputs | None = None,
    *,
    tune: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    amount: float = 0.8,
    steps: int = 5,
    schedule: str = "geometric",
    drop: float | None = None,
    floor: float | None = None,
    unit: str = "macs",
    told: Callable[[str], None] = lambda text: None,
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
    if steps < 1 or schedule not in SCHEDULES:
        raise UsageError(
            "no such schedule", got=f"{steps} steps, {schedule}", wanted=", ".join(SCHEDULES)
        )
    if unit not in _UNITS:
        raise UsageError(
            "steps are by what can be counted", got=repr(unit), wanted=", ".join(_UNITS)
        )
    if drop is not None and floor is not None:
        raise UsageError("give drop or floor, not both")
    given = infer(model) if inputs is None else as_inputs(inputs)
    if given is None:
        raise UsageError("no inputs are known to trace the model with", fix="inputs=")
    with eval_mode(model):
        at_start = float(evaluate(model))
    least = floor if drop is None else at_start - drop
    good, whole, report = model, 0, None
    history: list[dict[str, Any]] = [{"step": 0, "removed": 0.0, "metric": at_start, "good": True}]
    for step in range(1, steps + 1):
        goal = SCHEDULES[schedule](step / steps, amount)
        now = report.after[unit] if report else 0
        share = goal if not report else 1 - (1 - goal) * whole / now
        if share <= 0:  # rounding went further than this already
            continue
        try:
            smaller, found = prune(good, given, amount=share, unit=unit, latency=False, **options)
        except QkitError as error:
            if report is None:
                raise
            history.append({"step": step, "good": False, "reason": error.problem})
            break
        whole = whole or found.before[unit]
        tune(smaller)
        smaller.eval()
        metric = float(evaluate(smaller))
        is_good = least is None or metric >= least
        removed = round(1 - found.after[unit] / whole, 4)
        history.append({"step": step, "removed": removed, "metric": metric, "good": is_good})
        told(f"step {step}: {removed:.1%} of {unit} removed, metric {metric:g}")
        if not is_good:
            break
        good, report = smaller, _since(report, found)
    if report is None:
        raise BudgetError(
            "the model is not good enough even after the first step",
            got=history[-1].get("metric"),
            wanted=f"at least {least}",
            fix="more steps, a longer tune, a smaller amount, or a lower floor",
        )
    report.history = history
    report.scheme = f"pruned {amount:g} of {unit} in {steps} steps"
    report.recipe |= {"amount": amount, "steps": steps, "schedule": schedule, "floor": least}
    sample = few(given)
    assert sample is not None
    with eval_mode(model):
        fill_error(report, run(model, sample), good, sample)
        fill_speed(report, model, good, sample)
    fill_cost(report, start)
    return good, report


def _since(first: PruneReport | None, last: PruneReport) -> PruneReport:
    """``last``, counted from what the ``first`` one began with."""
    if first is not None:
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
