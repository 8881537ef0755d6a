"""Structured pruning: trace, rank, choose, cut, prove; the model that comes out is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from qkit.errors import CoverageError, InputError, UsageError, first_line, nearest
from qkit.models import Inputs, run
from qkit.pruning.attributes import Misfit, fit, hold
from qkit.pruning.facts import Facts
from qkit.pruning.groups import Group, Removed, Size, groups_of, size
from qkit.pruning.importance import Loss, Scores, check_importance, scores
from qkit.pruning.plan import Limits, Ranking, check_amount, reach
from qkit.pruning.surgery import cut
from qkit.pruning.trace import trace
from qkit.report import measure

UNITS = ("macs", "params", "bytes", "latency")
# How long a candidate is timed beside the whole model when the amount is latency.
TIMED_SECONDS = 0.5
LATENCY_STEPS = 24


@dataclass(frozen=True)
class Cut:
    """What became of one group: ``kept`` of its ``units``, of ``width`` rows each."""

    name: str
    units: int
    kept: int
    width: int


@dataclass(frozen=True, eq=False)
class Pruned:
    """The smaller ``model``, what became of each group, and its cost before and after."""

    model: nn.Module
    cuts: tuple[Cut, ...]
    before: Size
    after: Size
    remarks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """What to remove: the share ``amount`` of the ``unit`` (:data:`UNITS`), the least of what
    ``importance`` says first, within ``limits``; ``ignore`` names modules whose outputs stay.

    ``through_norms`` also removes channels that a normalisation or a mean goes over, such as the
    width of a transformer: what is left is then normalised by other statistics. ``loss(model)``
    is for the importance ``taylor``. ``blocks`` says that whole blocks go instead
    (:mod:`qkit.pruning.blocks`).
    """

    amount: float = 0.5
    unit: str = "macs"
    importance: str = "l1"
    limits: Limits = field(default_factory=Limits)
    ignore: Sequence[str] = ()
    through_norms: bool = False
    loss: Loss | None = None
    seed: int = 0
    blocks: bool = False

    def __post_init__(self) -> None:
        check_amount(self.amount)
        check_importance(self.importance)
        if self.unit not in UNITS:
            raise UsageError("unknown unit", got=repr(self.unit), wanted=nearest(self.unit, UNITS))


def prune_channels(
    model: nn.Module, inputs: Inputs, request: Request, *, in_place: bool = False
) -> Pruned:
    """Remove channels, neurons and heads from ``model``, in the mode that it is in.

    The result is a copy with tensors of its own unless ``in_place``. It is proven on ``inputs``:
    its outputs are those of ``model`` with zeros in place of what was removed.

    Raises :class:`~qkit.errors.InputError` where the model cannot be traced or has values that
    are not finite, :class:`~qkit.errors.CoverageError` if nothing can be removed and
    :class:`~qkit.errors.BudgetError` if not enough can.
    """
    run(model, inputs)  # a clear error about the inputs, before anything is paid for
    _check_finite(model)
    facts = trace(model, inputs.args, inputs.kwargs, through_norms=request.through_norms)
    remarks: list[str] = []
    while True:
        groups = groups_of(facts, model, request.ignore)
        if not groups:
            raise _nothing(facts, remarks)
        found = scores(
            request.importance,
            facts,
            groups,
            model,
            inputs=inputs,
            loss=request.loss,
            seed=request.seed,
        )
        try:
            removed = _choose(model, facts, groups, found, inputs, request)
            pruned, counts = fit(model, facts, removed, inputs)
            break
        except Misfit as misfit:
            if (where := hold(facts, model, misfit)) is None:
                raise _unfit(misfit) from misfit
            remarks.append(f"what {where} counts by a number of its own stays whole")
    if in_place:
        cut(model, facts, removed, counts)
        pruned = model
    cuts = tuple(Cut(g.name, len(g.units), int((~removed[g.units]).sum()), g.width) for g in groups)
    remarks += _remarks(facts, groups, found, request)
    return Pruned(pruned, cuts, size(facts), size(facts, removed), tuple(remarks))


def _choose(
    model: nn.Module,
    facts: Facts,
    groups: list[Group],
    found: Scores,
    inputs: Inputs,
    request: Request,
) -> Removed:
    ranking = Ranking(facts, groups, found, request.limits)
    if not len(ranking):
        raise CoverageError(
            f"no group has a measure of {request.importance!r}", fix="another --importance"
        )
    if request.unit != "latency":
        whole = getattr(size(facts), request.unit)
        return reach(
            ranking,
            (1 - request.amount) * whole,
            lambda removed: getattr(size(facts, removed), request.unit),
            what=request.unit,
        )

    def share(removed: Removed) -> float:
        smaller, _ = fit(model, facts, removed, inputs)
        times = measure(
            {"before": lambda: run(model, inputs), "after": lambda: run(smaller, inputs)},
            seconds=TIMED_SECONDS,
        )
        return times["after"].median / times["before"].median

    return reach(ranking, 1 - request.amount, share, what="latency", steps=LATENCY_STEPS)


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            bad = int((~finite).sum())
            raise InputError("a parameter has values that are not finite", where=name, got=bad)


def _nothing(facts: Facts, remarks: list[str]) -> CoverageError:
    reasons = [*remarks, *(f"{name} is not followed" for name in facts.stops)]
    return CoverageError(
        "nothing can be removed: no channels, neurons or heads are inside the model",
        got="; ".join(reasons) or None,
    )


def _unfit(misfit: Misfit) -> InputError:
    what = "computes something else" if misfit.error is None else first_line(misfit.error)
    return InputError(
        f"the model does not work with fewer channels: {what}",
        where=next(iter(misfit.modules), None) or None,
        fix="leave that layer out with --ignore",
    )


def _remarks(facts: Facts, groups: list[Group], found: Scores, request: Request) -> list[str]:
    remarks = [
        f"labels are not followed through {name} ({count}x): what it reads stays whole"
        for name, count in facts.stops.items()
    ]
    unmeasured = [g.name for g in groups if np.isinf(found[g.units]).all()]
    if unmeasured:
        names = ", ".join(unmeasured[:5])
        remarks.append(f"no measure of {request.importance!r}, so left whole: {names}")
    if request.through_norms:
        remarks.append(
            "channels inside normalisations went too: outputs are those of other statistics, and "
            "were compared by shape alone"
        )
    return remarks
