"""What a kind of step is: a row of the table of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.flows.compress.given import Given, Options
from qkit.models import Source
from qkit.report import Report


@dataclass(frozen=True)
class Written:
    """What a step that writes the output has made: its ``report``, and the file that a deployment
    needs as a ``model`` that the runtime runs, ``size`` samples of the data at a time."""

    report: Report
    model: nn.Module
    file: Path
    size: int


@dataclass(frozen=True)
class StepKind:
    """A row of the table. ``options`` are the names and defaults, ``check`` refuses impossible
    values, ``run`` returns the new model. ``fixes`` says that the step fixes the values of the
    weights (no other step may change them later). From its options, ``labelled`` tells whether a
    step needs labelled data, and ``real`` whether it needs real inputs. ``zeros`` says that the
    step keeps zeros where they are; ``follows`` that another step must come before.

    A step with ``write`` has no ``run``: its model is for a runtime, and what it writes is the
    output. ``write(model, options, given, out, source, overwrite)``.
    """

    summary: str
    options: Options
    check: Callable[[Options], object]
    run: Callable[[nn.Module, Options, Given], nn.Module] | None = None
    write: Callable[[nn.Module, Options, Given, Path, Source, bool], Written] | None = None
    fixes: bool = False
    zeros: bool = True
    follows: bool = False
    labelled: Callable[[Options], Any] = lambda options: False
    real: Callable[[Options], Any] = lambda options: False
