"""What a kind of step is: a row of the table of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.flows.compress.given import Given, Options, matches_fit
from qkit.flows.ptq import check_rules
from qkit.models import Source
from qkit.nn import survey
from qkit.report import Report
from qkit.spec import Recipe, Rule


@dataclass(frozen=True)
class Written:
    """What a step that writes the output has made: its ``report``, and the file that a deployment
    needs as a ``model`` that the runtime runs, ``size`` samples of the data at a time."""

    report: Report
    model: nn.Module
    file: Path
    size: int


def names_fit(model: nn.Module, options: Options, given: Given) -> None:
    """Raise :class:`~qkit.errors.UsageError` for a name in ``ignore`` or ``match`` that no module
    has."""
    ignored = tuple(Rule(pattern, None) for pattern in options.get("ignore", ()))
    check_rules(Recipe(ignored), model, survey(model))
    for each in (options, options.get("train") or {}):
        matches_fit(each.get("match", ()), model, given.teacher or model)


def anything_fits(model: nn.Module, options: Options, given: Given) -> None:
    """Where names mean more than modules: what does not fit is refused when it is looked for."""


@dataclass(frozen=True)
class StepKind:
    """A row of the table. ``options`` are the names and defaults, ``check`` refuses impossible
    values, ``fits`` what does not go with the model as it was before the first step (unless one
    before it ``renames`` modules), ``run`` returns the new model. ``fixes`` says that the step
    fixes the values of the weights (no other step may change them later). From its options,
    ``labelled`` tells whether a step needs labelled data, and ``real`` whether it needs real
    inputs. ``zeros`` says that the step keeps zeros where they are; ``follows`` that another step
    must come before.

    A step with ``write`` has no ``run``: its model is for a runtime, and what it writes is the
    output. ``write(model, options, given, out, source, overwrite)``.
    """

    summary: str
    options: Options
    check: Callable[[Options], object]
    run: Callable[[nn.Module, Options, Given], nn.Module] | None = None
    write: Callable[[nn.Module, Options, Given, Path, Source, bool], Written] | None = None
    fits: Callable[[nn.Module, Options, Given], object] = names_fit
    renames: bool = False
    fixes: bool = False
    zeros: bool = True
    follows: bool = False
    labelled: Callable[[Options], Any] = lambda options: False
    real: Callable[[Options], Any] = lambda options: False
