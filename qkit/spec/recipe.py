"""Recipes: how a whole model is treated, as ordered rules. The first rule that matches wins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.errors import InputError, UsageError
from qkit.spec.plain import from_a_file, show, take
from qkit.spec.scheme import Scheme

VERSION = 1


@dataclass(frozen=True)
class Rule:
    """``match`` -> ``scheme`` (or ``None``: leave it as it is).

    ``match`` is one of ``*`` (everything), ``re:<pattern>`` (a regular expression that must match
    from the start of the full name), a class name such as ``Linear``, or a full module name,
    which also stands for everything below it.
    """

    match: str
    scheme: Scheme | None
    # How the codes are found: a key of qkit.algorithms, or several joined by ``+``.
    algorithm: str = "rtn"

    def __post_init__(self) -> None:
        if not self.match:
            raise UsageError(
                "an empty name matches nothing", fix="give a module name or re:<pattern>"
            )
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise UsageError(f"not a regular expression: {error}", got=self.match) from error

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The names in ``algorithm``."""
        return tuple(self.algorithm.split("+"))

    def matches(self, name: str, *kinds: str) -> bool:
        """Whether this rule speaks of the module ``name`` that is of one of the classes ``kinds``.

        A layer inside an opened module has two: its own and that of the module.
        """
        if self.match.startswith("re:"):
            return re.match(self.match[3:], name) is not None
        return self.match in ("*", name, *kinds) or name.startswith(self.match + ".")


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; JSON round-trips, and the resolved recipe travels in the artifact."""

    rules: tuple[Rule, ...]

    @staticmethod
    def simple(
        scheme: Scheme,
        ignore: Sequence[str] = (),
        targets: Sequence[str] = ("*",),
        algorithm: str = "rtn",
    ) -> Recipe:
        """``targets`` get ``scheme`` by ``algorithm``, except what ``ignore`` names."""
        left = tuple(Rule(pattern, None) for pattern in ignore)
        return Recipe(left + tuple(Rule(pattern, scheme, algorithm) for pattern in targets))

    def rule_for(self, name: str, *kinds: str) -> Rule | None:
        """The first rule that matches the module ``name`` of one of the classes ``kinds``."""
        return next((rule for rule in self.rules if rule.matches(name, *kinds)), None)

    def with_schemes(self, change: Callable[[Scheme], Scheme]) -> Recipe:
        """This recipe with what ``change`` makes of each scheme."""
        rules = (replace(r, scheme=r.scheme and change(r.scheme)) for r in self.rules)
        return replace(self, rules=tuple(rules))

    def unused(self, modules: Iterable[tuple[str, ...]]) -> list[Rule]:
        """The rules that match no module at all; ``modules`` are names, each with class names."""
        known = list(modules)
        return [rule for rule in self.rules if not any(rule.matches(*m) for m in known)]

    def to_json(self) -> dict[str, object]:
        """This recipe as plain data."""
        rules = [
            {"match": r.match, "scheme": r.scheme and r.scheme.to_json(), "algorithm": r.algorithm}
            for r in self.rules
        ]
        return {"version": VERSION, "rules": rules}

    def dumps(self) -> str:
        """This recipe as JSON text."""
        return json.dumps(self.to_json(), indent=2)

    @staticmethod
    def from_json(data: object) -> Recipe:
        """The recipe that :meth:`to_json` described, else :class:`~qkit.errors.InputError`.

        An unknown version is refused before anything else is looked at.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(data, dict) and (type(version) is not int or version != VERSION):
            raise InputError("unknown recipe version", got=show(version), wanted=VERSION)
        _, rules = take(data, "recipe", {"version": int, "rules": list})
        return Recipe(tuple(_rule(rule) for rule in rules))


def steps_recipe(*steps: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A recipe of steps, ``{name: options}`` each, as plain data, as ``qkit compress`` follows it;
    ``fields`` that are None are left out."""
    rest = {name: value for name, value in fields.items() if value is not None}
    return {"version": VERSION, "steps": [dict(step) for step in steps]} | rest


def steps_of(recipe: object) -> list[str]:
    """The names of the steps of a recipe that an artifact holds; none of one of rules.

    Of old, a single step was ``{"step": name, ...}``.
    """
    if not isinstance(recipe, dict):
        return []
    if "step" in recipe:
        return [str(recipe["step"])]
    steps = recipe.get("steps")
    each = steps if isinstance(steps, list) else []
    return [str(name) for step in each if isinstance(step, dict) for name in step]


def _rule(data: object) -> Rule:
    kinds = {"match": str, "scheme": object, "algorithm": str}
    match, scheme, algorithm = take(data, "rule", kinds)
    with from_a_file("rule"):
        return Rule(match, None if scheme is None else Scheme.from_json(scheme), algorithm)
