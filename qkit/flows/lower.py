"""``qkit quantize --target``: a model for a runtime behind the PT2E flow, proved by that runtime.

The artifact is a folder: the runtime's file (such as ``model.onnx``), ``qkit.json``,
``report.json``, and ``check.safetensors`` with inputs and the outputs of the converted program and
of the float model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import RequestError, UsageError
from qkit.flows.algorithm import AUTO, check_algorithms, resolve_algorithm
from qkit.flows.check import recorded, small
from qkit.flows.data import Data, in_memory
from qkit.flows.data_check import suspicions
from qkit.flows.details import weight_distributions
from qkit.flows.evaluate import (
    COMPARED_SAMPLES,
    MAX_SLOWDOWN,
    AnyInputs,
    eval_mode,
    fill_cost,
    fill_outputs,
    fill_size,
    new_report,
    tensor_bytes,
)
from qkit.flows.goal import reach
from qkit.flows.lowered_rows import lowered_distributions, lowered_rows
from qkit.flows.pt2e import convert
from qkit.flows.ptq import Progress, no_progress, quantize_module
from qkit.flows.qat import Qat, fill_training, train_quantized, trained_scheme
from qkit.flows.runtime import FLOAT, judge, run_fresh
from qkit.flows.save import check_budgets, fill_files, head, write_report
from qkit.graph import BATCH, capture
from qkit.graph.capture import Dims
from qkit.models import Inputs, Source, run
from qkit.nn import Entry
from qkit.report import LayerRow, Report, measure
from qkit.spec import Recipe, Scheme, parse
from qkit.targets import LOWERED, check
from qkit.targets.artifact import CHECK, read_artifact, write_meta
from qkit.targets.backend import Audit, Backend, Converted, backend
from qkit.targets.staging import check_destination, staged
from qkit.targets.weights import save_tensors


def lower(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    path: str | Path | None,
    *,
    target: str = "onnx",
    calib: Data | AnyInputs | None = None,
    ignore: Sequence[str] = (),
    observer: str = "minmax",
    algorithm: str = AUTO,
    dims: Dims | None = None,
    options: Mapping[str, Any] | None = None,
    qat: Qat | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    min_coverage: float = 0.0,
    min_sqnr: float | None = None,
    calib_report: bool = False,
    goal_sqnr: float | None = None,
    details: bool = False,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Quantize ``model`` for ``target`` and write the artifact ``path``; None only quantizes.

    ``scheme`` is ``int8-static``, ``int8-dynamic``, or one of weights only that the target has
    (``w4a16-g32``, by ``algorithm`` as in :func:`qkit.quantize`; that of int8 activations is
    one or several of :mod:`qkit.flows.treat`). ``calib`` are real inputs, in
    batches; a dynamic scheme takes no more of them than the comparison does. ``dims`` names dynamic
    dimensions besides the batch (:func:`qkit.graph.capture`), ``options`` are the target's.
    With ``calib_report`` the report has a row for each activation with a learnt range, with
    ``details`` histograms of weights. With
    ``goal_sqnr`` the layers that cost most stay in float, as many as the output needs for that SQNR
    (:func:`qkit.flows.goal.reach`). With ``qat`` (:class:`qkit.flows.qat.Qat`) the quantized model
    is trained before it is written (``int8-static``, also called ``int8-qat``); ``calib`` are its
    training data, unless given.

    The artifact appears once the target's runtime has loaded it in a fresh process and reproduced
    the converted program. Raises what :func:`qkit.flows.pt2e.convert` raises, before the data are
    read :class:`~qkit.errors.MissingExtraError` and :class:`~qkit.errors.RequestError` for what the
    target lacks, :class:`~qkit.errors.VerificationError` if the runtime disagrees, and
    :class:`~qkit.errors.CoverageError` if it runs no integer kernel.
    """
    start = time.perf_counter()
    if qat is not None and isinstance(scheme, str):
        scheme = trained_scheme(scheme) or scheme
    if not isinstance(scheme, Recipe):
        scheme = requested(scheme, ignore, algorithm, calibrated=True)
    recipe, options = scheme, dict(options or {})
    notes: list[str] = []
    runtime = backend(known_target(target))
    main = check_request(recipe, runtime, options)
    check_algorithms(recipe, calibrated=True, graph=not main.weight_only)
    out = None if path is None else Path(path)
    if out is not None:
        check_destination(out, overwrite=overwrite)
    check_floats(model, target)
    if calib is None:
        if qat is None:
            raise UsageError("there are no inputs to capture the model with", fix="give calib")
        calib = qat.inputs()
    data = calib if isinstance(calib, Data) else in_memory(calib)
    dialect, tuned = runtime.dialect(options), None
    if main.weight_only:
        if goal_sqnr is not None:
            raise UsageError("--goal-sqnr is for int8-static and int8-dynamic", got=main.name)
        converted, qmodel, rows = _weight_only(
            model, recipe, data, runtime, dims, options, progress
        )
        drawn = weight_distributions(model, qmodel, rows)
        long = main.long_form()
    else:
        other = {rule.algorithm for rule in recipe.rules if rule.scheme} - {"rtn"}
        if other and qat is not None:
            raise UsageError("training finds the codes itself", got=", ".join(sorted(other)))
        given: dict[str, Any] = {"dims": dims, "options": options, "progress": progress}
        learnt: dict[str, Any] = {"dialect": dialect, "observer": observer}
        if goal_sqnr is not None and qat is not None:
            raise UsageError("--goal-sqnr chooses layers by ranges that are not trained")
        if goal_sqnr is not None:
            recipe, notes = reach(model, recipe, data, goal_sqnr, dims=dims, **learnt)
        if qat is not None:
            tuned = train_quantized(model, recipe, qat, dialect=dialect, told=told, **given)
            converted = tuned.converted
        else:
            converted = convert(model, recipe, data, watch=calib_report, **learnt, **given)
        converted = replace(converted, module=runtime.specialize(converted))
        rows, long = lowered_rows(model, converted, dialect, tuned), dialect.describe(main)
        drawn = lowered_distributions(model, converted, tuned, rows)
    inputs = _compared(converted, data)
    report = new_report(main, target, recipe, rows)
    report.scheme_long = long
    report.remarks += [*notes, *converted.notes, *converted.captured.notes]
    if any(site.static for site in converted.sites):
        report.remarks += suspicions(model, inputs, converted.samples)
        report.calibration = {"samples": converted.samples, "origin": data.origin}
        if calib_report:
            report.calibration["activations"] = [asdict(row) for row in converted.activations]
    fill_outputs(report, model, converted.module, inputs)
    if tuned is not None and qat is not None:
        fill_training(report, qat, tuned)
    report.kernels = {}
    if details:
        report.details["histograms"] = [asdict(each) for each in drawn]
    least = max((limit for limit in (min_sqnr, goal_sqnr) if limit is not None), default=None)
    check_budgets(report, min_coverage=min_coverage, min_sqnr=least)
    before, after = (tensor_bytes(m.state_dict()) for m in (model, converted.module))
    fill_size(report, before, after)
    if out is not None:
        told(f"writing {out} and verifying it in a fresh process")
        _save(model, converted, runtime, inputs, out, report, source, overwrite, start)
    fill_cost(report, start)
    return report


def requested(
    scheme: str | Scheme, ignore: Sequence[str], algorithm: str, *, calibrated: bool
) -> Recipe:
    """The recipe of a request, as :func:`qkit.quantize` has it; refused if there is none."""
    main = parse(scheme) if isinstance(scheme, str) else scheme
    algorithm = resolve_algorithm(main, algorithm, calibrated=calibrated)
    recipe = Recipe.simple(main, ignore, algorithm=algorithm)
    check_algorithms(recipe, calibrated=calibrated, graph=not main.weight_only)
    return recipe


def check_request(recipe: Recipe, runtime: Backend, options: Mapping[str, Any]) -> Scheme:
    """The main scheme of ``recipe``, refused here if the target cannot do what it says."""
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    if not schemes:
        raise UsageError("the recipe quantizes nothing: no rule has a scheme")
    for scheme in schemes:
        check(runtime.name, scheme)
        runtime.check(scheme, options)
    if len({scheme.weight_only for scheme in schemes}) > 1:
        raise RequestError(
            "one artifact has quantized activations or weights alone, not both",
            got=", ".join(scheme.name for scheme in schemes),
            wanted="int8-static and int8-dynamic layers together, or weight-only schemes",
        )
    return schemes[-1]


def known_target(target: str) -> str:
    """``target``, or :class:`~qkit.errors.UsageError` if it is none of the PT2E flow."""
    if target not in LOWERED:
        raise UsageError("not a target of the PT2E flow", got=target, wanted=", ".join(LOWERED))
    return target


def check_floats(model: nn.Module, target: str) -> None:
    """Raise :class:`~qkit.errors.RequestError` for a model in another type than fp32."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        raise RequestError(
            f"the target {target!r} takes fp32 models",
            got=", ".join(sorted(str(kind)[6:] for kind in kinds)),
            fix="save model.float() and quantize that",
        )


def _weight_only(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    runtime: Backend,
    dims: Dims | None,
    options: dict[str, Any],
    progress: Progress,
) -> tuple[Converted, nn.Module, list[LayerRow]]:
    """qkit's own layers, as :func:`qkit.quantize` makes them, in the target's form and as such."""

    def obstacle(entry: Entry, scheme: Scheme) -> str | None:
        if type(entry.module) not in (nn.Linear, nn.Embedding):
            return f"{runtime.name} has weights without activations for linear layers and tables"
        return None

    example = data.first()
    qmodel, rows = quantize_module(
        model, recipe, calib=data.head(COMPARED_SAMPLES), progress=progress, obstacle=obstacle
    )
    with eval_mode(model, qmodel):
        captured = capture(model, example.args, example.kwargs, dims=dims)
        lowered = runtime.weight_only(qmodel, options)
        module = capture(lowered, example.args, example.kwargs, dims=dims).module()
    space = f"qkit_{runtime.name}::"
    names = [getattr(getattr(n.target, "_schema", None), "name", "") for n in module.graph.nodes]
    expected = sum(name.startswith(space) for name in names)
    return Converted(captured, module, (), expected, options), qmodel, rows


def _compared(converted: Converted, data: Data) -> Inputs:
    """What both models are compared and timed on: the batch of the program, if that is fixed, or
    no more than it takes."""
    if converted.captured.shapes is None:
        return data.first()
    bounds = converted.options.get("bounds") or {}
    return data.head(min(COMPARED_SAMPLES, bounds.get(BATCH, COMPARED_SAMPLES)))


def _save(
    model: nn.Module,
    converted: Converted,
    runtime: Backend,
    inputs: Inputs,
    out: Path,
    report: Report,
    source: Source | None,
    overwrite: bool,
    start: float,
) -> None:
    # What the program is verified and timed on; one of a fixed batch takes nothing less.
    inputs = inputs if converted.captured.shapes is None else small(inputs)
    with staged(out, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as other:
        rival, file = Path(other, runtime.file), folder / runtime.file
        runtime.export_float(converted.captured, rival)
        runtime.export(converted, file)
        with eval_mode(model):
            tensors = recorded(converted.module, inputs)
            floats = run(model, inputs)
        tensors |= {f"{FLOAT}.{i}": t for i, t in enumerate(floats)}
        save_tensors({name: t.contiguous() for name, t in tensors.items()}, folder / CHECK)
        options = {name: value for name, value in converted.options.items() if value is not None}
        meta = head(report, source, None, target=runtime.name)
        meta |= {"options": options, "observer": converted.observer}
        artifact = write_meta(folder, meta)
        outputs, facts = run_fresh(artifact, runtime.name, rival=rival)
        wanted: list[Tensor] = [tensors[f"module.{i}"] for i in range(len(floats))]
        report.verification = judge(str(out), runtime, wanted, floats, outputs)
        found = runtime.audit(file, converted)
        found.require(str(out))
        _fill(report, found, facts["latency_ms"], runtime, model, inputs)
        report.size_bytes[FLOAT] = rival.stat().st_size
        fill_files(report, source, file.stat().st_size, out)
        fill_cost(report, start)
        write_report(report, folder)
    read_artifact(out)


def _fill(
    report: Report,
    found: Audit,
    latency: dict[str, Any],
    runtime: Backend,
    model: nn.Module,
    inputs: Inputs,
) -> None:
    """Kernels and latency, and what a reader should know about them."""
    report.kernels = found.integer
    report.coverage |= {"integer_layers": found.ran, "integer_layers_expected": found.expected}
    with eval_mode(model):
        eager = measure({"eager": lambda: run(model, inputs)}, seconds=0.5)["eager"]
    speedup = round(latency["float"]["median"] / latency["quantized"]["median"], 3)
    report.latency_ms = latency | {
        "eager": eager.to_json(),
        "speedup": speedup,
        "threads": torch.get_num_threads(),
        "runtime": runtime.runtime(),
    }
    report.remarks += found.remarks
    if found.ran < found.expected:
        floats = ", ".join(f"{name} x{n}" for name, n in found.floating.items())
        report.remarks.append(
            f"{found.ran} of {found.expected} quantized layers run as integers; in float: {floats}"
        )
    if found.left:
        report.remarks.append(f"{found.left} conversions to float are left between kernels")
    if speedup <= MAX_SLOWDOWN:
        report.remarks.append(_why_slow(found, speedup, runtime))


def _why_slow(found: Audit, speedup: float, runtime: Backend) -> str:
    text = f"not faster: {speedup:.2f}x the float model's speed in {runtime.runtime()}"
    if found.ran < found.expected or found.left:
        return text + ", because not all layers run as integers without conversions between them"
    return text + (
        ", although every quantized layer runs as integers: with so little work in each, rounding "
        "the activations costs more than the kernels save"
    )
