"""Sites: what a recipe makes of each layer of a captured graph, decided before calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from qkit.graph.dialect import Dialect
from qkit.graph.kinds import LAYERS, Kind, is_float, kind_of, owner_of, weight_of
from qkit.spec import Int, PerChannel, PerTensor, Recipe, Rule, Scheme


@dataclass(frozen=True)
class Site:
    """One operator with a weight: the ``node`` that calls it, the module ``owner`` of its weight
    (of a table, which may share it, the module that looks it up), its ``kind``, the full name of
    the ``weight`` (None: it is computed), the scheme it gets, or the reason why it is left, how
    many ``layers`` it computes (an LSTM may have several; a table computes nothing: 0), and the
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
    def table(self) -> bool:
        """Whether rows of the weight are looked up: they alone are quantized, not the indices."""
        return kind_of(self.node).role == "table"  # type: ignore[union-attr]

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
    weight = weight_of(node) if kind.role in LAYERS else None
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
        if kind is None or kind.role not in LAYERS:
            continue
        table = kind.role == "table"
        weight, caller = weight_of(node), owner_of(node)[0]
        owner = weight[1] if weight and not (table and caller) else caller
        scheme, reason = rule_scheme(node, kind, recipe)
        rule = rule_of(node, kind, recipe)
        algorithms = ("rtn",) if rule is None or table else rule.algorithms
        if scheme is not None:
            scheme = Scheme(scheme.weight) if table else scheme
            reason = "its weight is computed" if weight is None else ""
            reason = reason or _obstacle(node, kind, scheme, dialect) or ""
        name = str(weight[0].target) if weight else None
        given = None if reason else scheme
        steps = kind.role == "recurrent" and weight
        layers = 0 if table else int(str(node.args[4])) if steps else 1
        sites.append(Site(node, owner, kind.name, name, given, reason or None, layers, algorithms))
    return _without_float_readers(module, sites)


def _without_float_readers(module: fx.GraphModule, sites: list[Site]) -> list[Site]:
    """``sites`` without the tables whose weight something else reads in float: codes would be
    stored beside it, and save nothing."""
    quantized = {site.node: site for site in sites if site.scheme is not None}
    floats = {
        str(node.target): user
        for node in module.graph.nodes
        if node.op == "get_attr"
        for user in node.users
        if user not in quantized
    }

    def judged(site: Site) -> Site:
        reader = floats.get(str(site.weight)) if site.table and site.scheme is not None else None
        if reader is None:
            return site
        while reader.target is torch.ops.aten.detach.default and reader.users:
            reader = next(iter(reader.users))
        kind, schema = kind_of(reader), getattr(reader.target, "_schema", None)
        what = kind.name if kind else schema.name if schema else reader.name
        name = owner_of(reader)[0] or "the model"
        return replace(
            site, scheme=None, reason=f"its weight is read in float too, by {name} ({what})"
        )

    return [judged(site) for site in sites]


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
