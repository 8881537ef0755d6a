"""``qkit prune``: fewer channels, neurons and heads; a model that is smaller and runs as it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import UsageError
from qkit.flows.evaluate import AnyInputs, as_inputs, eval_mode, few, fill_cost
from qkit.flows.quantize import default_output
from qkit.flows.save import deliver
from qkit.flows.source import module_of, open_source, request_inputs
from qkit.models import Inputs, infer, resolve_callable, run
from qkit.nn import open_modules, opening
from qkit.nn.computed import detached
from qkit.pruning.blocks import prune_blocks
from qkit.pruning.importance import Loss
from qkit.pruning.plan import ROUND_TO, Limits
from qkit.pruning.structured import Pruned, prune_channels
from qkit.pruning.structured import Request as Wanted
from qkit.report import compare, machine, measure, versions
from qkit.report.pruning import GroupRow, PruneReport
from qkit.spec import steps_recipe
from qkit.targets.staging import check_destination


def prune(
    model: nn.Module,
    inputs: AnyInputs | None = None,
    *,
    amount: float = 0.5,
    unit: str = "macs",
    importance: str = "l1",
    ignore: Sequence[str] = (),
    keep: int = 1,
    round_to: int = ROUND_TO,
    per_layer: bool = False,
    through_norms: bool = False,
    blocks: bool = False,
    loss: Loss | None = None,
    seed: int = 0,
    in_place: bool = False,
    latency: bool = True,
) -> tuple[nn.Module, PruneReport]:
    """Remove the share ``amount`` of the multiply-adds (or another ``unit``: ``params``,
    ``bytes``, ``latency``) of ``model``; return the smaller model, in eval mode, and the report.

    What goes are channels of convolutions, neurons and attention heads, the least important first
    (``l1``, ``l2``, ``bn``, ``taylor`` with a ``loss`` of the model, ``activation``, ``random``),
    with all that belongs to them in other layers. ``inputs`` are what the model is traced and
    timed with; inferred if they can be. ``ignore`` names modules whose outputs stay. Of each group
    at least ``keep`` units stay, in multiples of ``round_to`` rows; ``per_layer`` takes the same
    share everywhere. ``through_norms``: see :class:`qkit.pruning.structured.Request`. With
    ``blocks``, whole blocks go instead (layers of a transformer, residual blocks), those first
    without which the outputs change least (:mod:`qkit.pruning.blocks`). ``model`` is not changed
    unless ``in_place``.

    Raises :class:`~qkit.errors.UsageError` for wrong options,
    :class:`~qkit.errors.InputError` for a model that cannot be traced,
    :class:`~qkit.errors.CoverageError` if nothing can be removed and
    :class:`~qkit.errors.BudgetError` if not enough can.
    """
    start = time.perf_counter()
    limits = Limits(keep, round_to, per_layer)
    wanted = Wanted(amount, unit, importance, limits, ignore, through_norms, loss, seed, blocks)
    given = infer(model) if inputs is None else as_inputs(inputs)
    return _prune(model, given, wanted, in_place=in_place, latency=latency, start=start)


def _prune(
    model: nn.Module,
    inputs: Inputs | None,
    wanted: Wanted,
    *,
    in_place: bool,
    latency: bool,
    start: float,
) -> tuple[nn.Module, PruneReport]:
    if inputs is None:
        raise UsageError(
            "no inputs are known to trace the model with", fix="inputs=, or --input or --inputs"
        )
    inputs = few(inputs)
    assert inputs is not None
    with eval_mode(model):
        model = model if wanted.blocks else _opened(model, in_place=in_place)
        reference = run(model, inputs)
        cut = prune_blocks if wanted.blocks else prune_channels
        result = cut(model, inputs, wanted, in_place=in_place)
        pruned = result.model.eval()
        report = _report(result, wanted)
        fill_error(report, reference, pruned, inputs)
        if latency and not in_place:
            fill_speed(report, model, pruned, inputs)
    fill_cost(report, start)
    return pruned, report


def _opened(model: nn.Module, *, in_place: bool) -> nn.Module:
    """``model``, or a copy that shares its tensors, with attention whose heads can go.

    torch's ``MultiheadAttention`` needs heads that are together as wide as the model.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and opening(module) is not None
    ]
    if not names:
        return model
    if not in_place:
        memo = {id(t): t for t in [*model.parameters(), *model.buffers()]} | detached(model)
        model = copy.deepcopy(model, memo)
    return open_modules(model, names)


def _report(result: Pruned, wanted: Wanted) -> PruneReport:
    before, after = asdict(result.before), asdict(result.after)
    report = PruneReport(
        scheme=f"pruned {wanted.amount:g} of {wanted.unit}",
        recipe=recipe_of(wanted),
        groups=[GroupRow(cut.name, cut.units, cut.kept, cut.width) for cut in result.cuts],
        before=before,
        after=after,
        ratio={key: round(after[key] / max(before[key], 1), 4) for key in before},
        versions=versions(),
        machine=machine(),
        verification={"status": "not run"},
    )
    report.size_bytes["source"] = before["bytes"]
    report.remarks += result.remarks
    return report


def recipe_of(wanted: Wanted) -> dict[str, Any]:
    """The resolved request as plain data: a recipe of one step."""
    options = {
        "amount": wanted.amount,
        "unit": wanted.unit,
        "importance": wanted.importance,
        "ignore": list(wanted.ignore),
        "through_norms": wanted.through_norms,
        "blocks": wanted.blocks,
    }
    return steps_recipe({"prune": options | asdict(wanted.limits)}, seed=wanted.seed)


def fill_error(
    report: PruneReport, reference: list[Tensor], pruned: nn.Module, inputs: Inputs
) -> None:
    """The error of what ``pruned`` gives against the outputs before."""
    report.error = compare(reference, run(pruned, inputs)).to_json() | {"inputs": inputs.origin}


def fill_speed(report: PruneReport, model: nn.Module, pruned: nn.Module, inputs: Inputs) -> None:
    """Time both models, interleaved, on ``inputs``."""
    times = measure({"before": lambda: run(model, inputs), "after": lambda: run(pruned, inputs)})
    speedup = times["before"].median / times["after"].median
    report.latency_ms = {name: latency.to_json() for name, latency in times.items()} | {
        "speedup": round(speedup, 3),
        "threads": torch.get_num_threads(),
        "runtime": "torch eager",
    }
    if speedup <= 1:
        report.remarks.append(
            f"not faster: {speedup:.2f}x the speed before; so little work is in each layer that "
            "calling them is what takes the time"
        )


@dataclass(frozen=True)
class PruneRequest:
    """One run of ``qkit prune`` on a file; the fields are the command's options."""

    path: str
    amount: float = 0.5
    unit: str = "macs"
    importance: str = "l1"
    output: str | None = None
    ignore: tuple[str, ...] = ()
    keep: int = 1
    round_to: int = ROUND_TO
    per_layer: bool = False
    through_norms: bool = False
    blocks: bool = False
    loss: str | None = None
    input: str | None = None
    calib: str | None = None
    image: tuple[str, ...] = ()
    model: str | None = None
    trust_pickle: bool = False
    overwrite: bool = False
    dry_run: bool = False
    seed: int = 0


def prune_file(
    request: PruneRequest, *, told: Callable[[str], None] = lambda text: None
) -> PruneReport:
    """Load, prune, write, verify in a fresh process; return the report.

    Raises what :func:`prune`, :func:`qkit.models.load` and :func:`qkit.save` raise; nothing is
    left at the output then.
    """
    start = time.perf_counter()
    limits = Limits(request.keep, request.round_to, request.per_layer)
    if request.importance == "taylor" and request.loss is None:
        raise UsageError("the importance 'taylor' needs a loss", fix="--loss MODULE:FUNCTION")
    wanted = Wanted(
        request.amount,
        request.unit,
        request.importance,
        limits,
        request.ignore,
        request.through_norms,
        seed=request.seed,
        blocks=request.blocks,
        loss=None if request.loss is None else resolve_callable(request.loss),  # type: ignore[arg-type]
    )
    out = Path(request.output or default_output(request.path, "pruned"))
    check_destination(out, overwrite=request.overwrite)
    loaded = open_source(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    told(f"loaded {request.path}: {loaded.source.kind}")
    model = module_of(loaded, "does not tell what is computed, which pruning must know")
    inputs = request_inputs(request, loaded)
    pruned, report = _prune(model, inputs, wanted, in_place=False, latency=True, start=start)
    deliver(pruned, report, request, out, loaded, few(inputs), told, start)
    return report
