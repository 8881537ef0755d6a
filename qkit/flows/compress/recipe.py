"""Reading a recipe: YAML or JSON with ``steps``, refused before any work if it makes no sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import InputError, MissingExtraError, UsageError, first_line, nearest
from qkit.flows.compress.steps import STEPS, Options
from qkit.spec.plain import show

VERSION = 1
FORMATS = ("qkit", "coded")
FIELDS = ("steps", "data", "val", "calib", "input", "seed", "format")


@dataclass(frozen=True)
class Step:
    """One step with all of its options, defaults too."""

    name: str
    options: Options

    def to_json(self) -> dict[str, Any]:
        """As it stands in a resolved recipe."""
        return {self.name: self.options}


@dataclass(frozen=True)
class Plan:
    """A resolved recipe. ``data`` and ``val`` name labelled data (``FILE.npz`` or
    ``module:function``), ``calib`` real inputs, ``input`` a shape; ``format`` is that of the
    output: a folder (``qkit``) or one entropy-coded file (``coded``)."""

    steps: tuple[Step, ...]
    data: str | None = None
    val: str | None = None
    calib: str | None = None
    input: str | None = None
    seed: int = 0
    format: str = "qkit"

    def to_json(self) -> dict[str, Any]:
        """This plan as plain data, which is a recipe again."""
        rest = {name: getattr(self, name) for name in FIELDS if name != "steps"}
        return {"version": VERSION, "steps": [step.to_json() for step in self.steps]} | rest

    def first(self, count: int) -> dict[str, Any]:
        """What the model after the first ``count`` steps is made by; not the form of the output."""
        whole = self.to_json()
        return {k: v for k, v in whole.items() if k != "format"} | {"steps": whole["steps"][:count]}


def read_recipe(recipe: Mapping[str, Any] | str | Path) -> Plan:
    """The plan of a recipe, or of the YAML or JSON file of one.

    Raises :class:`~qkit.errors.InputError` for a file that is none, and
    :class:`~qkit.errors.UsageError` for unknown steps and options, impossible values, and an order
    that makes no sense: what fixes the values of the weights (``cluster``, ``quantize``) comes
    once, and last.
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
    names = {name: given.get(name) for name in ("data", "val", "calib", "input")}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name} of a recipe is a name", got=show(value))
    plan = Plan(tuple(map(_step, steps)), **names, seed=seed, format=fmt)
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
    for step in plan.steps:
        if fixed is not None:
            raise UsageError(
                f"the step {step.name!r} cannot come after {fixed!r}, which fixes the weights",
                got=" -> ".join(each.name for each in plan.steps),
                fix=f"{step.name} before {fixed}"
                if step.name != fixed and not STEPS[step.name].fixes
                else "one of cluster and quantize, once",
            )
        if STEPS[step.name].fixes:
            fixed = step.name


def _check_data(plan: Plan) -> None:
    for step in plan.steps:
        kind = STEPS[step.name]
        if kind.trains(step.options) and plan.data is None:
            raise UsageError(
                f"the step {step.name!r} trains, and no data are named",
                fix="data: FILE.npz or module:function, in the recipe",
            )
        if kind.real(step.options) and plan.calib is None:
            raise UsageError(
                f"the step {step.name!r} learns from real inputs", fix="calib: FILE.npz"
            )
    if plan.input is not None and plan.calib is not None:
        raise UsageError("give input or calib, not both", got=f"{plan.input} and {plan.calib}")
