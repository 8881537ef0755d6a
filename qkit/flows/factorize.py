"""``factorize``: large layers as two or more small ones, where that saves parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkit.algorithms import Stats
from qkit.algorithms.low_rank import Spectrum, spectrum
from qkit.errors import CoverageError, InputError, UsageError
from qkit.flows.calibrate import collect, passes
from qkit.flows.compute import multiply_adds, parameters
from qkit.flows.evaluate import (
    AnyInputs,
    as_inputs,
    blank_report,
    few,
    fill_comparison,
    fill_cost,
    fill_size,
    tensor_bytes,
)
from qkit.flows.factors import (
    LEARNING_KINDS,
    Wanted,
    choose_ranks,
    factors_of,
    is_matrix,
    matrix_of,
)
from qkit.flows.ptq import Plan, check_tensors, copied, opened, plan_layers
from qkit.flows.quantize import Request, default_output
from qkit.flows.rows import left_row, notes
from qkit.flows.save import deliver
from qkit.flows.source import module_of, open_source, request_inputs
from qkit.models import Inputs, infer
from qkit.nn import Entry, open_modules, swap
from qkit.nn.factorized import (
    Factorized,
    merged,
    obstacle,
)
from qkit.numerics import check_finite
from qkit.packing.store import join
from qkit.pruning.surgery import EDITS, edits_of
from qkit.report import LayerRow, Report, tensor_sqnr_db
from qkit.spec import Recipe, Scheme, parse, steps_recipe
from qkit.targets.staging import check_destination

# What stands for "this layer" where plans ask for a scheme.
_ANY = parse("w8a16")


def factorize(
    model: nn.Module,
    *,
    amount: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    sensitivity: bool = False,
    conv: str = "channel",
    ignore: Sequence[str] = (),
    calib: AnyInputs | None = None,
    inputs: AnyInputs | None = None,
    in_place: bool = False,
    latency: bool = True,
) -> tuple[nn.Module, Report]:
    """``model`` with linear layers and convolutions factorized, and the report.

    ``nn.Linear`` becomes two layers by a truncated SVD; a convolution becomes ``channel`` (the
    same, of its flattened weight), ``spatial`` (two dimensions apart), ``tucker``, ``cp`` or
    ``separable`` (a depthwise kernel and a 1x1; its rank is the depth multiplier). With
    ``calib`` (real inputs), ``svd``, ``channel`` and ``separable`` keep what matters to these
    inputs. ``amount``
    (0.5 where nothing is said) is the share of its parameters that each of those layers loses; with
    ``sensitivity``, it is taken of all of them, where it costs the output least, which is measured
    on the inputs layer by layer. Or each layer keeps the share ``energy`` of its own, or the
    ``rank``. A layer whose factors would be as large as it is stays, and says so. ``inputs`` are
    what the error, the latency and the multiply-adds are measured on.

    Raises :class:`~qkit.errors.UsageError` for options that mean nothing,
    :class:`~qkit.errors.CoverageError` if no layer becomes smaller.
    """
    start = time.perf_counter()
    wanted = Wanted(amount, energy, rank, sensitivity, conv, tuple(ignore))
    if inputs is not None and calib is not None:
        raise UsageError("give inputs or calib, not both")
    data = None if calib is None else as_inputs(calib)
    given = data or (infer(model) if inputs is None else as_inputs(inputs))
    return _factorize(
        model, wanted, few(given), data, in_place=in_place, latency=latency, start=start
    )


def _factorize(
    model: nn.Module,
    wanted: Wanted,
    inputs: Inputs | None,
    calib: Inputs | None,
    *,
    in_place: bool,
    latency: bool,
    start: float,
) -> tuple[nn.Module, Report]:
    if wanted.sensitivity and inputs is None:
        raise UsageError("sensitivity is measured on inputs", fix="inputs=, or --input or --calib")
    new, rows = factorize_module(model, wanted, calib, inputs, in_place=in_place)
    scheme = f"factorized, {wanted}"
    by = "what the calibration data excite of them" if calib is not None else "their own energy"
    report = blank_report(
        scheme,
        f"{scheme}: layers by SVD, convolutions by {wanted.conv}, ranks by {by}",
        "torch",
        steps_recipe(wanted.to_json()),
        rows,
    )
    report.coverage["done"] = "factorized"
    fill_size(report, tensor_bytes(model.state_dict()), tensor_bytes(new.state_dict()))
    if in_place:
        inputs = None
    fill_comparison(report, model, new, inputs, latency=latency)
    counts = {"parameters": (parameters(model), parameters(new))}
    if inputs is not None:
        counts["multiply-adds"] = (multiply_adds(model, inputs), multiply_adds(new, inputs))
    report.metrics = {
        name: {"before": before, "after": after} for name, (before, after) in counts.items()
    }
    fill_cost(report, start)
    return new, report


def factorize_file(
    request: Request, wanted: Wanted, *, told: Callable[[str], None] = lambda text: None
) -> Report:
    """Load, factorize, compare, write, verify in a fresh process; return the report.

    Of ``request``, the fields count that are not about quantization. Raises what
    :func:`factorize`, :func:`qkit.models.load` and :func:`qkit.save` raise; nothing is left at the
    output then.
    """
    start = time.perf_counter()
    out = Path(request.output or default_output(request.path, "factorized"))
    check_destination(out, overwrite=request.overwrite)
    loaded = open_source(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    told(f"loaded {request.path}: {loaded.source.kind}")
    model = module_of(loaded, "does not tell how its layers are called")
    data = request_inputs(request, loaded)
    new, report = _factorize(
        model,
        wanted,
        few(data),
        data if request.calib else None,
        in_place=False,
        latency=not request.dry_run,
        start=start,
    )
    deliver(new, report, request, out, loaded, few(data), told, start)
    return report


def factorize_module(
    model: nn.Module,
    wanted: Wanted,
    calib: Inputs | None = None,
    inputs: Inputs | None = None,
    *,
    in_place: bool = False,
) -> tuple[nn.Module, list[LayerRow]]:
    """``model`` factorized, and a row for each module; see :func:`factorize`."""

    def why_not(entry: Entry, scheme: Scheme) -> str | None:
        if entry.tied_to is not None:
            return f"shares its weight with {entry.tied_to}"
        if wanted.kind_of(entry.module) == "none":
            return "convolutions are left"
        return obstacle(entry.module, wanted.kind_of(entry.module))

    plans = plan_layers(model, Recipe.simple(_ANY, wanted.ignore), why_not, done="factorized")
    check_tensors(model)
    model = open_modules(model if in_place else copied(model, []), opened(plans))
    chosen = {p.entry.name: model.get_submodule(p.entry.name) for p in plans if p.rule}
    for name, layer in chosen.items():
        weight: Any = layer.weight
        check_finite(weight.detach(), join(name, "weight"))
    weighed = {n: layer for n, layer in chosen.items() if is_matrix(wanted, layer)}
    moments: dict[str, Tensor] = {}
    if calib is not None:
        whole = {n: m for n, m in chosen.items() if wanted.kind_of(m) in LEARNING_KINDS}
        for part in passes(whole):
            stats = collect(model, {n: [whole[n]] for n in part}, calib)
            moments |= {n: s.moment[0] for n, s in stats.items() if _seen(s)}
    spectra = {n: spectrum(matrix_of(wanted, m), moments.get(n)) for n, m in weighed.items()}
    ranks = choose_ranks(model, chosen, wanted, spectra, inputs)
    made = {
        name: factors_of(chosen[name], wanted, found, spectra.get(name), moments.get(name))
        for name, found in ranks.items()
        if found is not None
    }
    if not made:
        raise CoverageError(
            "nothing was factorized: no layer becomes smaller",
            got=str(wanted),
            fix="a larger amount, less energy, or a lower rank",
        )
    rows = [_row(plan, made.get(plan.entry.name), spectra, moments) for plan in plans]
    vars(model)[EDITS] = edits_of(model).without(made)
    return swap(model, made), rows


def _seen(stats: Stats) -> bool:
    return stats.vectors > 0


def _row(
    plan: Plan,
    made: Factorized | None,
    spectra: Mapping[str, Spectrum],
    moments: Mapping[str, Tensor],
) -> LayerRow:
    entry: Any = plan.entry
    if made is None:
        return left_row(entry, plan.reason or "its factors would be no smaller than it is")
    weight = entry.module.weight.detach()
    factors: list[Any] = list(made)
    size = sum(factor.weight.numel() for factor in factors)
    ranks = " and ".join(map(str, made.ranks))
    name = entry.name
    kept = f"{spectra[name].kept(made.ranks[0]):.1%} of the energy" if name in spectra else None
    row = left_row(entry, None)
    sqnr = tensor_sqnr_db(weight, made.weight.detach())
    return replace(
        row,
        scheme=f"{made.kind} {ranks}",
        algorithm=f"{made.kind} of what data excite" if name in moments else made.kind,
        bits_per_weight=round(size * weight.element_size() * 8 / weight.numel(), 4),
        sqnr_db=None if sqnr is None else round(sqnr, 3),
        note=notes(entry.note, kept),
    )


def merge_factors(model: nn.Module) -> nn.Module:
    """``model`` with every factorized layer merged to one again, in place; return the model.

    At full rank that is the original up to the rounding of its dtype.
    """
    found = {n: merged(m) for n, m in model.named_modules() if isinstance(m, Factorized)}
    if not found:
        raise InputError("the model has no factorized layers")
    return swap(model, found)
