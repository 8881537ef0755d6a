"""Sites: what a recipe makes of each layer of a captured graph, decided before calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from qkit.graph.dialect import Dialect
from qkit.graph.kinds import Kind, is_float, kind_of, owner_of, weight_of
from qkit.spec import Int, PerChannel, PerTensor, Recipe, Rule, Scheme


@dataclass(frozen=True)
class Site:
    """One operator with a weight: the ``node`` that calls it, the module ``owner`` of its weight,
    its ``kind``, the full name of the ``weight`` (None: it is computed), the scheme it gets, or the
    reason why it is left, how many ``layers`` it computes (an LSTM may have several), and the
    ``algorithms`` by which its codes are found."""

    node: fx.Node
    owner: str
    kind: str
    weight: str | None
    scheme: Scheme | None
    reason: str | None = None
    layers: int = 1
    algorithms: tuple[str, ...] = ("rtn",)

    @property
    def static(self) -> bool:
        """Whether the input has a range that calibration learns."""
        return self.scheme is not None and when(self.scheme) == "static"


def when(scheme: Scheme) -> str:
    """``static``, ``dynamic``, or ``weight`` where activations are left alone."""
    return "weight" if scheme.input is None else scheme.input.when


def rule_scheme(node: fx.Node, kind: Kind, recipe: Recipe) -> tuple[Scheme | None, str]:
    """What ``recipe`` says of ``node``: a scheme, or the reason to leave it."""
    rule = rule_of(node, kind, recipe)
    if rule is None:
        return None, "no rule of the recipe matches it"
    return rule.scheme, f"ignored by {rule.match!r}" if rule.scheme is None else ""


def rule_of(node: fx.Node, kind: Kind, recipe: Recipe) -> Rule | None:
    """The rule of ``recipe`` for ``node``.

    A rule may name the operator (``Linear`` also for ``F.linear``), or the module that calls it, or
    the module that owns its weight.
    """
    name, module = owner_of(node)
    weight = weight_of(node) if kind.role in ("weighted", "recurrent") else None
    names = [(name, module), (name, kind.name)]
    if weight is not None and weight[1] != name:
        names.append((weight[1], kind.name))
    rules = (r for r in recipe.rules if any(r.matches(*each) for each in names))
    return next(rules, None)


def find_sites(module: fx.GraphModule, recipe: Recipe, dialect: Dialect) -> list[Site]:
    """Every operator of ``module`` with a weight, in order, and what becomes of it."""
    sites = []
    for node in module.graph.nodes:
        kind = kind_of(node)
        if kind is None or kind.role not in ("weighted", "recurrent"):
            continue
        weight = weight_of(node)
        owner = weight[1] if weight else owner_of(node)[0]
        scheme, reason = rule_scheme(node, kind, recipe)
        rule = rule_of(node, kind, recipe)
        algorithms = ("rtn",) if rule is None else rule.algorithms
        if scheme is not None:
            reason = "its weight is computed" if weight is None else ""
            reason = reason or _obstacle(node, kind, scheme, dialect) or ""
        name = str(weight[0].target) if weight else None
        given = None if reason else scheme
        layers = int(str(node.args[4])) if kind.role == "recurrent" and weight else 1
        sites.append(Site(node, owner, kind.name, name, given, reason or None, layers, algorithms))
    return sites


def _obstacle(node: fx.Node, kind: Kind, scheme: Scheme, dialect: Dialect) -> str | None:
    """Why ``dialect`` cannot express ``scheme`` at ``node``; None where it can."""
    fmt = scheme.weight.format
    if not isinstance(fmt, Int) or fmt.bits != 8 or not scheme.weight.symmetric:
        return f"{dialect.name} has integer kernels for symmetric int8 weights ({scheme.name})"
    if scheme.weight.granularity not in (PerTensor(), PerChannel(0)):
        return f"{dialect.name} has weights per channel or tensor, not in groups ({scheme.name})"
    if kind.name not in dialect.kinds:
        return f"{dialect.name} has no integer {kind.name}"
    if when(scheme) == "dynamic" and kind.name not in dialect.dynamic:
        return f"{dialect.name} has no {kind.name} with ranges taken at each call: use int8-static"
    if kind.role == "recurrent":
        return _lstm_obstacle(node, scheme)
    if not is_float(node):
        return "it does not compute floats"
    return None


def _lstm_obstacle(node: fx.Node, scheme: Scheme) -> str | None:
    if when(scheme) != "dynamic":
        return "an LSTM has kernels for ranges taken at each step only: use int8-dynamic"
    state: Any = node.args[1]
    weights: Any = node.args[2]
    names = [str(getattr(each, "target", "")) for each in weights]
    if len(state) != 2 or any("weight_hr" in name for name in names):
        return "there is no kernel for an LSTM with projections"
    return None
