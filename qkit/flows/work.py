"""What streaming a checkpoint writes, and by which jobs: decided from names, shapes and types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkit.flows.casts import nothing_cast
from qkit.flows.pieces import Cast, Layer, Pieces
from qkit.flows.ptq import Plan, plan_layers
from qkit.flows.rows import exact_input, left_row, tied_row
from qkit.models.checkpoint import Checkpoint
from qkit.nn import QUANTIZED, QLayer, swap, tree
from qkit.nn.names import opened_state
from qkit.packing.store import Stored, join
from qkit.report import LayerRow
from qkit.spec import Float, Recipe, Scheme
from qkit.targets.weights import describe_weights

Rows = Mapping[str, LayerRow | None]


@dataclass
class Job:
    """What one tensor of the source becomes: the tensors that ``run`` writes, and their row."""

    writes: list[str]
    run: Callable[[Pieces], LayerRow | None]


@dataclass
class Work:
    """What is written, and by which jobs.

    ``stored`` are the tensors of the artifact and ``facts`` what ``qkit.json`` says about them,
    ``checks`` those of its check file. ``jobs`` are by the name of the tensor that each reads, in
    the order in which these lie on disk. ``expected`` are the rows of the report as far as they
    are known before; ``rows`` makes them from those of the jobs.
    """

    stored: dict[str, Stored]
    checks: dict[str, Stored]
    facts: dict[str, Any]
    jobs: dict[str, Job]
    expected: list[LayerRow]
    rows: Callable[[Rows], list[LayerRow]]


def plan_work(
    source: Checkpoint, scheme: Scheme, recipe: Recipe, kinds: Mapping[str, str]
) -> tuple[Checkpoint, Work]:
    """What streaming ``source`` by ``recipe`` will write, and ``source`` under the names of that.

    ``kinds`` are the class names of modules, as far as they are known.
    Raises what :func:`qkit.flows.ptq.plan_layers` raises.
    """
    model = tree(source.metas, kinds)
    moved, _ = opened_state(source.metas, kinds)
    entries = {moved.get(name, name): entry for name, entry in source.entries.items()}
    if scheme.casts_model and isinstance(scheme.weight.format, Float):
        work = _cast(model, scheme.weight.format)
    else:
        work = _quantized(model, plan_layers(model, recipe))

    def place(name: str) -> tuple[str, int, str]:
        entry = entries[name]
        return str(entry.path), entry.offset, name

    work.jobs = {name: work.jobs[name] for name in sorted(work.jobs, key=place)}
    return replace(source, entries=entries), work


def _quantized(model: nn.Module, plans: list[Plan]) -> Work:
    layers: dict[str, Layer] = {}
    made: dict[str, QLayer] = {}
    for plan in plans:
        if plan.rule is None or plan.rule.scheme is None:
            continue
        module: Any = plan.entry.module
        quantized, name = QUANTIZED[type(module)], plan.entry.name
        scheme = quantized.part_of(plan.rule.scheme)
        made[name] = quantized(module, scheme.weight, scheme.input)
        if plan.entry.tied_to is not None:
            made[name].share_weight(made[plan.entry.tied_to])
            layers[plan.entry.tied_to].owners.append(name)
        else:
            algorithm, weight = plan.rule.algorithm, join(name, "weight")
            note = exact_input(plan.rule.scheme, scheme)
            layers[name] = Layer(
                plan.entry, scheme.name, algorithm, weight, made[name], [name], note
            )
    tensors, facts = describe_weights(swap(model, made))
    checks = {
        f"layers.{name}": Stored((2, each.layer.weight_size[0]), torch.float32)
        for each in layers.values()
        for name in each.owners
    }
    biases = {join(name, "bias") for name in made}
    jobs = {
        each.weight: Job(each.stored, partial(Pieces.quantize, each=each))
        for each in layers.values()
    }
    codes = {name for job in jobs.values() for name in job.writes}
    for name in tensors.keys() - codes:
        jobs[name] = Job([name], partial(Pieces.copy, name=name, finite=name in biases))
    expected = [_expected_row(plan) for plan in plans]
    return Work(_specs(tensors), checks, facts, jobs, expected, partial(_rows, plans))


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    return {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _expected_row(plan: Plan) -> LayerRow:
    """The row of a layer before it is quantized, for the coverage."""
    return replace(left_row(plan.entry, plan.reason), scheme=_scheme_name(plan))


def _scheme_name(plan: Plan) -> str | None:
    """What the layer follows of the scheme that is planned for it."""
    if plan.rule is None or plan.rule.scheme is None:
        return None
    return QUANTIZED[type(plan.entry.module)].part_of(plan.rule.scheme).name


def _rows(plans: list[Plan], found: Rows) -> list[LayerRow]:
    rows: dict[str, LayerRow] = {}
    for plan in plans:
        name, tied = plan.entry.name, plan.entry.tied_to
        row = left_row(plan.entry, plan.reason)
        if plan.rule is not None:
            made = found[join(name, "weight")] if tied is None else None
            row = made or tied_row(plan.entry, _scheme_name(plan), rows[tied or name])
        rows[name] = row
    return list(rows.values())


def _cast(model: nn.Module, fmt: Float) -> Work:
    tensors, facts = describe_weights(model)
    owners: dict[str, list[str]] = {name: [name] for name in tensors}
    for alias, name in facts["aliases"].items():
        owners[name].append(alias)
    dtype = getattr(torch, fmt.torch_name)
    stored = _specs({n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})
    checks = {
        f"layers.{name}": Stored((2,), torch.float64) for names in owners.values() for name in names
    }
    jobs, parameters = {}, dict(model.named_parameters())
    for name, tensor in tensors.items():
        each = Cast(name, fmt if tensor.is_floating_point() else None, owners[name])
        jobs[name] = Job([name], partial(Pieces.cast, each=each))
    expected = [
        LayerRow(name, "Parameter", tuple(p.shape), p.numel(), scheme=str(fmt))
        for name, p in parameters.items()
    ]
    if not expected:
        raise nothing_cast()

    def rows(found: Rows) -> list[LayerRow]:
        return [row for name in parameters if (row := found[name]) is not None]

    return Work(stored, checks, facts, jobs, expected, rows)
