"""Reading a recipe: YAML or JSON with ``steps``, refused before any work if it makes no sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import InputError, MissingExtraError, UsageError, first_line, nearest
from qkit.flows.compress.given import Given, Options
from qkit.flows.compress.steps import STEPS
from qkit.flows.train.score import metric_of, named, objective_of
from qkit.models import parse_images
from qkit.spec import steps_recipe
from qkit.spec.plain import show
from qkit.spec.recipe import VERSION

FORMATS = ("qkit", "coded")
FIELDS = ("steps", "data", "val", "loss", "metric", "calib", "input", "image", "seed", "format")
NAMES = ("data", "val", "metric", "calib", "input")
LOSS = "cross-entropy"


@dataclass(frozen=True)
class Step:
    """One step with all of its options, defaults too."""

    name: str
    options: Options

    def to_json(self) -> dict[str, Any]:
        """As it stands in a resolved recipe."""
        return {self.name: self.options}

    def follow(self, model: nn.Module, given: Given) -> nn.Module:
        """The model after this step, which is one that gives a model."""
        run = STEPS[self.name].run
        assert run is not None
        return run(model, self.options, given).eval()


@dataclass(frozen=True)
class Plan:
    """A resolved recipe. ``data`` and ``val`` name labelled data (``FILE.npz``, a folder of
    pictures by class, or ``module:function``), ``loss`` and ``metric`` what is trained and judged
    by (:func:`~qkit.flows.train.score.named`), ``calib`` real inputs, ``input`` a shape; ``image``
    how pictures are read (:func:`qkit.models.parse_images`); ``format`` is that of the output: a
    folder (``qkit``) or one entropy-coded file (``coded``)."""

    steps: tuple[Step, ...]
    data: str | None = None
    val: str | None = None
    loss: str = LOSS
    metric: str | None = None
    calib: str | None = None
    input: str | None = None
    image: tuple[str, ...] = ()
    seed: int = 0
    format: str = "qkit"

    def to_json(self) -> dict[str, Any]:
        """This plan as plain data, which is a recipe again."""
        rest = {name: getattr(self, name) for name in FIELDS if name != "steps"}
        rest["image"] = list(self.image)
        return steps_recipe(*(step.to_json() for step in self.steps)) | rest

    def first(self, count: int) -> dict[str, Any]:
        """What the model after the first ``count`` steps is made by; not the form of the output."""
        whole = self.to_json()
        return {k: v for k, v in whole.items() if k != "format"} | {"steps": whole["steps"][:count]}


def read_recipe(recipe: Mapping[str, Any] | str | Path) -> Plan:
    """The plan of a recipe, or of the YAML or JSON file of one.

    Raises :class:`~qkit.errors.InputError` for a file that is none, and
    :class:`~qkit.errors.UsageError` for unknown steps and options, impossible values, and an order
    that makes no sense: what fixes the values of the weights (``cluster``, ``quantize``, ``qat``,
    ``export``) comes once, and last; factors fill the zeros of ``sparsify``; a teacher that is the
    student itself has nothing to say (``distill``).
    """
    given = recipe if isinstance(recipe, Mapping) else _read(Path(recipe))
    given = {name: value for name, value in given.items() if (name, value) != ("version", VERSION)}
    if unknown := [name for name in given if name not in FIELDS]:
        raise UsageError(
            "unknown field of a recipe", got=show(unknown[0]), wanted=", ".join(FIELDS)
        )
    steps = given.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UsageError("a recipe has steps", got=show(steps), wanted="a list of at least one")
    seed, fmt = given.get("seed", 0), given.get("format", "qkit")
    if type(seed) is not int:
        raise UsageError("a seed is an integer", got=show(seed))
    if fmt not in FORMATS:
        raise UsageError("unknown format", got=show(fmt), wanted=", ".join(FORMATS))
    names = {name: given.get(name) for name in NAMES} | {"loss": given.get("loss") or LOSS}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name} of a recipe is a name", got=show(value))
    images = given.get("image") or []
    if not isinstance(images, list) or not all(isinstance(each, str) for each in images):
        raise UsageError("image of a recipe is a list of KEY=VALUE", got=show(images))
    parse_images(images)  # refused here if they mean nothing
    how: dict[str, Any] = {"image": tuple(images), "seed": seed, "format": fmt}
    plan = Plan(tuple(map(_step, steps)), **names, **how)
    loss, metric = named(plan.loss), plan.metric and named(plan.metric)
    objective_of(loss)  # known, or refused
    metric_of(metric, loss)
    _check_order(plan)
    _check_data(plan)
    return plan


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe: {first_line(error)}", where=str(path)) from error
    if path.suffix == ".json":
        load, wrong = json.loads, (ValueError, RecursionError)
    else:
        try:
            import yaml
        except ImportError as error:
            raise MissingExtraError("PyYAML", "compress", needed_for="a recipe in YAML") from error
        load, wrong = yaml.safe_load, (yaml.YAMLError, RecursionError)
    try:
        found = load(text)
    except wrong as error:
        raise InputError(f"not a recipe: {first_line(error)}", where=str(path)) from error
    if not isinstance(found, dict):
        raise InputError("not a recipe", where=str(path), got=show(found), wanted="steps: [...]")
    return found


def _step(given: object) -> Step:
    """``name``, or ``{name: options}``."""
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, dict) or len(given) != 1:
        raise UsageError("a step is a name with its options", got=show(given))
    name, options = next(iter(given.items()))
    options = {} if options is None else options
    if name not in STEPS:
        raise UsageError("unknown step", got=show(name), wanted=nearest(str(name), STEPS, 8))
    if not isinstance(options, dict):
        raise UsageError(f"the options of {name!r} are names and values", got=show(options))
    known = STEPS[name].options
    if unknown := [option for option in options if option not in known]:
        raise UsageError(
            f"unknown option of {name!r}", got=show(unknown[0]), wanted=", ".join(known)
        )
    resolved = {**known, **options}
    ignore = resolved.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(each, str) for each in ignore):
        raise UsageError(f"ignore of {name!r} is a list of names", got=show(ignore))
    STEPS[name].check(resolved)
    return Step(name, resolved)


def _check_order(plan: Plan) -> None:
    fixed: str | None = None
    order = " -> ".join(step.name for step in plan.steps)
    for index, step in enumerate(plan.steps):
        kind = STEPS[step.name]
        if fixed is not None:
            raise UsageError(
                f"the step {step.name!r} cannot come after {fixed!r}, which fixes the weights",
                got=order,
                fix=f"one of {', '.join(n for n in STEPS if STEPS[n].fixes)}, once"
                if kind.fixes
                else f"{step.name} before {fixed}",
            )
        if kind.fixes:
            fixed = step.name
        if kind.follows and index == 0:
            raise UsageError(
                f"the step {step.name!r} has the model as it was for a teacher: a step that makes "
                "it smaller comes before",
                got=order,
                fix="train, or prune before it",
            )
        if not kind.zeros and any(each.name == "sparsify" for each in plan.steps[:index]):
            raise UsageError(
                f"the step {step.name!r} fills the zeros of 'sparsify' again",
                got=order,
                fix=f"{step.name} before sparsify",
            )
    last = plan.steps[-1].name
    if STEPS[last].write is not None and plan.format != FORMATS[0]:
        raise UsageError(
            f"the step {last!r} writes the file of a runtime", got=f"format: {plan.format}",
            fix="leave out the format",
        )  # fmt: skip


def _check_data(plan: Plan) -> None:
    for step in plan.steps:
        kind = STEPS[step.name]
        if kind.labelled(step.options) and plan.data is None:
            raise UsageError(
                f"the step {step.name!r} learns from labels, and no data are named",
                fix="data: FILE.npz or module:function, in the recipe",
            )
        if kind.real(step.options) and plan.calib is None:
            raise UsageError(
                f"the step {step.name!r} learns from real inputs", fix="calib: FILE.npz"
            )
    if plan.input is not None and plan.calib is not None:
        raise UsageError("give input or calib, not both", got=f"{plan.input} and {plan.calib}")
