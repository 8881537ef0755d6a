"""Post-training quantization of a module, or of a bare state dict, by a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from qkit.algorithms import CALIBRATED, DATA_FREE, Stats
from qkit.errors import CoverageError, InputError, UsageError, nearest
from qkit.flows.calibrate import collect, input_qparams, passes
from qkit.flows.rows import (
    exact_input,
    left_row,
    notes,
    quantized_row,
    short_group,
    tied_row,
    underflow,
    zeroed,
)
from qkit.graph import quiet
from qkit.models import Inputs
from qkit.nn import QUANTIZED, Entry, QLayer, open_modules, opening, survey, swap
from qkit.nn.computed import detached
from qkit.nn.open import gone
from qkit.numerics import QParams, check_finite, dequantize
from qkit.packing.store import join
from qkit.report import LayerRow, tensor_sqnr_db
from qkit.spec import Recipe, Rule, Scheme

Progress = Callable[[int, int, str], None]


# Why a target or a format has no place for a layer under a scheme; None where it has.
Obstacle = Callable[[Entry, Scheme], str | None]


def no_obstacle(entry: Entry, scheme: Scheme) -> str | None:
    """Every layer that qkit can quantize."""
    return None


def no_progress(done: int, total: int, name: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Plan:
    """What will happen to one entry of the survey: a rule to follow, or a reason to leave it."""

    entry: Entry
    rule: Rule | None
    reason: str | None


def quantize_module(
    model: nn.Module,
    recipe: Recipe,
    *,
    calib: Inputs | None = None,
    in_place: bool = False,
    progress: Progress = no_progress,
    obstacle: Obstacle = no_obstacle,
) -> tuple[nn.Module, list[LayerRow]]:
    """``model`` with every layer that ``recipe`` names quantized, and one row for each module.

    ``calib`` is the data for algorithms that need some (``gptq``). Layers with an ``obstacle``
    stay in float.
    Unless ``in_place``, the model is copied; the float weights of layers that are replaced are
    shared with the original while the copy is made, not duplicated.

    Raises :class:`~qkit.errors.UsageError` if a rule matches no module,
    :class:`~qkit.errors.InputError` for NaN, infinity or weights on the meta device,
    :class:`~qkit.errors.CoverageError` if nothing can be quantized.
    """
    plans = plan_layers(model, recipe, obstacle)
    chosen = [plan for plan in plans if plan.rule is not None]
    check_tensors(model)
    if not in_place:
        model = copied(model, _replaced(model, plans))
    model = open_modules(model, opened(plans))
    ranges = _static_ranges(model, chosen, calib)
    rows: dict[str, LayerRow] = {}
    layers: dict[str, QLayer] = {}
    by_name = {plan.entry.name: plan for plan in chosen}
    for part, stats in _calibrated(model, chosen, calib):
        for name in part:
            progress(len(layers), len(chosen), name)
            layers[name], rows[name] = _quantize_layer(
                model, by_name[name], layers, rows, stats.get(name), ranges.get(name)
            )
    progress(len(chosen), len(chosen), "")
    model = swap(model, layers)
    return model, [rows.get(plan.entry.name) or left_row(plan.entry, plan.reason) for plan in plans]


def plan_layers(
    model: nn.Module, recipe: Recipe, obstacle: Obstacle = no_obstacle, *, done: str = "quantized"
) -> list[Plan]:
    """What ``recipe`` makes of each module of ``model``, whose values are not looked at.

    ``done`` is what a planned layer will be, for messages.

    Raises :class:`~qkit.errors.UsageError` if a rule matches no module,
    :class:`~qkit.errors.CoverageError` if nothing can be quantized.
    """
    entries = survey(model)
    check_rules(recipe, model, entries)
    plans = _agree([_plan(entry, recipe, obstacle) for entry in entries])
    if all(plan.rule is None for plan in plans):
        raise _nothing(plans, done)
    return _closed(model, plans)


def opened(plans: list[Plan]) -> list[str]:
    """The names of the modules of the model that are opened for what is planned inside them."""
    names = (plan.entry.inside for plan in plans if plan.rule and plan.entry.opens)
    return list(dict.fromkeys(name for name in names if name is not None))


def _calibrated(
    model: nn.Module, chosen: list[Plan], calib: Inputs | None
) -> Iterator[tuple[list[str], dict[str, Stats]]]:
    """The names of the layers to quantize, a part at a time, with the statistics they need."""
    tables = {_weight_of(p) for p in chosen if not QUANTIZED[type(p.entry.module)].has_vectors}
    needy = {
        plan.entry.name: model.get_submodule(plan.entry.name)
        for plan in chosen
        if plan.rule and plan.rule.algorithm in CALIBRATED and plan.entry.tied_to is None
        if plan.entry.name not in tables
    }
    for part in passes(needy) if calib is not None else ():
        users = {
            name: [model.get_submodule(p.entry.name) for p in chosen if _weight_of(p) == name]
            for name in part
        }
        assert calib is not None
        yield part, collect(model, users, calib)
    yield [plan.entry.name for plan in chosen if plan.entry.name not in needy], {}


def _static_ranges(
    model: nn.Module, chosen: list[Plan], calib: Inputs | None
) -> dict[str, QParams]:
    """The scale of the input of every layer whose scheme wants it ahead of time."""
    inputs = {
        plan.entry.name: QUANTIZED[type(plan.entry.module)].part_of(plan.rule.scheme).input
        for plan in chosen
        if plan.rule and plan.rule.scheme
    }
    wanted = {n: acts for n, acts in inputs.items() if acts is not None and acts.when == "static"}
    if not wanted:
        return {}
    if calib is None:
        raise UsageError(
            "static ranges of activations are learnt from data",
            fix="--calib FILE.npz with real inputs, or a dynamic scheme (w8a8)",
        )
    return input_qparams(model, wanted, calib)


def _closed(model: nn.Module, plans: list[Plan]) -> list[Plan]:
    """A module that is to be opened for nothing stays closed: one row, with all the reasons."""
    used = set(opened(plans))
    parts: dict[str, list[Plan]] = {}
    for plan in plans:
        if plan.entry.opens and plan.entry.inside not in (None, *used):
            parts.setdefault(str(plan.entry.inside), []).append(plan)

    def close(name: str) -> Plan:
        count = sum(plan.entry.parameters for plan in parts[name])
        reasons = dict.fromkeys(plan.reason for plan in parts[name] if plan.reason)
        return Plan(Entry(name, model.get_submodule(name), count, None), None, "; ".join(reasons))

    done: dict[str, Plan] = {}
    for plan in plans:
        name = plan.entry.inside
        if name is not None and name in parts:
            done.setdefault(name, close(name))
        else:
            done[plan.entry.name] = plan
    return list(done.values())


def _weight_of(plan: Plan) -> str:
    """The first owner of the weight of a planned layer."""
    return plan.entry.tied_to or plan.entry.name


def check_rules(recipe: Recipe, model: nn.Module, entries: Iterable[Entry] = ()) -> None:
    """Raise :class:`~qkit.errors.UsageError` for a rule that matches no module or entry."""
    modules: dict[str, tuple[str, ...]] = {n: (type(m).__name__,) for n, m in model.named_modules()}
    modules |= {entry.name: entry.kinds for entry in entries}
    for rule in recipe.unused((name, *kinds) for name, kinds in modules.items()):
        names = [name for name in modules if name]
        raise UsageError(
            "a rule matches no module of the model",
            got=repr(rule.match),
            wanted=f"a full name ({nearest(rule.match, names)}), a class name, or re:<pattern>",
        )


def check_tensors(model: nn.Module) -> None:
    """Raise :class:`~qkit.errors.InputError` for NaN, and tensors on the meta device."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InputError("the model has no values: a tensor is on the meta device", where=name)
        if not isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            check_damage(tensor.detach(), name)


def check_damage(tensor: Tensor, name: str) -> None:
    """Refuse NaN, which is damage anywhere; infinity may be a mask."""
    if tensor.is_floating_point() and tensor.isnan().any():
        check_finite(tensor, name)


def _plan(entry: Entry, recipe: Recipe, obstacle: Obstacle) -> Plan:
    rule = recipe.rule_for(entry.name, *entry.kinds)
    if entry.reason is not None:
        return Plan(entry, None, entry.reason)
    if rule is None:
        return Plan(entry, None, "no rule of the recipe matches it")
    if rule.scheme is None:
        return Plan(entry, None, f"ignored by {rule.match!r}")
    quantized = QUANTIZED[type(entry.module)]
    if lacks := quantized.lacks(quantized.part_of(rule.scheme)):
        return Plan(entry, None, f"a quantized {entry.kind} {lacks} ({rule.scheme.name})")
    if reason := obstacle(entry, rule.scheme):
        return Plan(entry, None, reason)
    return Plan(entry, rule, None)


def _agree(plans: list[Plan]) -> list[Plan]:
    """Owners of one weight follow one rule: if any is left in float, all are."""
    by_owner: dict[str, list[Plan]] = {}
    for plan in plans:
        by_owner.setdefault(plan.entry.tied_to or plan.entry.name, []).append(plan)

    def settle(plan: Plan) -> Plan:
        family = by_owner[plan.entry.tied_to or plan.entry.name]
        left = next((p for p in family if p.rule is None), None)
        if plan.rule is None:
            return plan
        if left is not None:
            return Plan(
                plan.entry, None, f"shares its weight with {left.entry.name}, left in float"
            )
        return replace(plan, rule=family[0].rule)

    return [settle(plan) for plan in plans]


def _nothing(plans: list[Plan], done: str) -> CoverageError:
    reasons = sorted({f"{p.entry.kind}: {p.reason}" for p in plans})
    return CoverageError(
        f"nothing was {done}: no layer of the model matched",
        got="; ".join(reasons[:6]) or "a model without parameters",
        wanted=f"at least one of {', '.join(kind.__name__ for kind in QUANTIZED)}",
        fix="qkit inspect shows the model's layers",
    )


def _replaced(model: nn.Module, plans: list[Plan]) -> list[Any]:
    """The parameters of which nothing is left once the ``plans`` are carried out."""
    weights: list[Any] = [plan.entry.module.weight for plan in plans if plan.rule is not None]
    for name in opened(plans):
        module = model.get_submodule(name)
        form = opening(module)
        if form is not None and all(p.rule for p in plans if p.entry.inside == name):
            weights += gone(module, form)
    return weights


def copied(model: nn.Module, replaced: list[Any]) -> nn.Module:
    """A copy of ``model`` that shares the parameters that will be ``replaced``."""
    memo = {id(tensor): tensor for tensor in replaced}
    try:
        with quiet():  # torch deprecates what the copy of a program of its own does
            return copy.deepcopy(model, memo | detached(model))
    except Exception as error:  # a model may hold anything: locks, handles, non-leaf tensors
        raise UsageError(
            f"the model cannot be copied: {error}", fix="in_place=True, if it may be changed"
        ) from error


def _quantize_layer(
    model: nn.Module,
    plan: Plan,
    layers: Mapping[str, QLayer],
    rows: Mapping[str, LayerRow],
    stats: Stats | None,
    input_qparams: QParams | None,
) -> tuple[QLayer, LayerRow]:
    entry, rule = plan.entry, plan.rule
    if rule is None or rule.scheme is None:
        raise AssertionError("a plan to quantize has a rule with a scheme")
    module: Any = model.get_submodule(entry.name)
    quantized = QUANTIZED[type(module)]
    scheme = quantized.part_of(rule.scheme)
    if entry.tied_to is not None:
        layer = quantized(module, scheme.weight, scheme.input)
        layer.share_weight(layers[entry.tied_to])
        if input_qparams is not None:
            layer.set_input_range(input_qparams)
        return layer, tied_row(entry, scheme.name, rows[entry.tied_to])
    weight = quantized.rows(module).detach().flatten(1)
    if (bias := module._parameters.get("bias")) is not None:
        check_finite(bias.detach(), join(entry.name, "bias"))
    spec, full_name = scheme.weight, join(entry.name, "weight")
    # A layer that the data never reached has no statistics; its row says which way it went.
    if stats is not None and stats.vectors:
        algorithm = rule.algorithm
        q = CALIBRATED[algorithm](weight, spec, stats, name=full_name)
    else:
        algorithm = rule.algorithm if rule.algorithm in DATA_FREE else "rtn"
        q = DATA_FREE[algorithm](weight, spec, name=full_name)
    decoded = dequantize(q)
    row = quantized_row(
        entry,
        scheme.name,
        algorithm,
        q.bits_per_weight,
        tensor_sqnr_db(weight, decoded),
        notes(
            *(entry.note, short_group(q), exact_input(rule.scheme, scheme)),
            _no_data(rule, algorithm, stats),
            underflow(zeroed(weight, decoded, spec)),
        ),
    )
    return quantized.from_float(module, q, scheme.input, input_qparams), row


def _no_data(rule: Rule, algorithm: str, stats: Stats | None) -> str | None:
    """Why an algorithm that learns from data did not."""
    if algorithm == rule.algorithm:
        return None
    if stats is None:
        return f"{algorithm}: its rows are looked up, there are no inputs to learn from"
    return f"{algorithm}: no calibration data reached it"
