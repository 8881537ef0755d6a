"""``--backend quanto``: optimum-quanto quantizes, under qkit's report and verification.

Weights only: of activations quanto needs a calibration of its own. quanto's ``quantize`` and
``freeze`` run on the layers that :func:`plan_layers` leaves to them, in a copy of the model. The
folder is quanto's own (:mod:`qkit.targets.quanto`), with ``qkit.json`` and ``report.json`` beside.
"""

from __future__ import annotations

import copy
import glob
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import MissingExtraError, RequestError, UsageError, first_line
from qkit.flows.algorithm import AUTO
from qkit.flows.check import model_check
from qkit.flows.evaluate import (
    eval_mode,
    few,
    fill_cost,
    fill_latency,
    fill_outputs,
    fill_size,
    for_dtype,
    new_report,
    tensor_bytes,
)
from qkit.flows.ptq import Plan, Progress, no_progress, plan_layers
from qkit.flows.quantize import Request, default_output
from qkit.flows.rows import left_row, quantized_row
from qkit.flows.save import check_budgets, complete, head
from qkit.flows.source import request_inputs
from qkit.flows.verify import verify_runtime
from qkit.models import Inputs, Loaded, run
from qkit.models import load as load_model
from qkit.models.folder import QUANTO_MAPS
from qkit.nn import Entry
from qkit.numerics import check_finite
from qkit.report import LayerRow, Report, package_version, tensor_sqnr_db
from qkit.spec import Recipe, Scheme, parse
from qkit.targets import QUANTO
from qkit.targets.artifact import CHECK, WEIGHTS, write_meta
from qkit.targets.quanto import BITS, TYPES
from qkit.targets.staging import check_destination, staged
from qkit.targets.torch import copy_config
from qkit.targets.weights import read_tensors, save_tensors

DISTRIBUTION = "optimum-quanto"
BF16_CRASH = (
    "torch's int8 product for bf16, which optimum-quanto calls, crashes on weights that are not "
    "aligned to 32 bytes (seen in torch 2.13 with AVX-512), as those mapped from a safetensors "
    "file may be: give requantize copies ({k: t.clone() for k, t in state.items()}), as the "
    "verification did; its from_pretrained does not copy"
)
# quanto's own short name, and what --scheme says where nobody chose.
_NAMES = {"qfloat8": "qfloat8_e4m3fn", "w8a16": "qint8"}


def quanto_file(
    request: Request,
    *,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """``quantize_file`` by optimum-quanto; ``request.scheme`` is a type of its weights.

    Raises what :func:`~qkit.flows.quantize.quantize_file` raises, and
    :class:`~qkit.errors.MissingExtraError` without the package.
    """
    start = time.perf_counter()
    kind = _resolve(request)
    out = Path(request.output or default_output(request.path, kind))
    check_destination(out, overwrite=request.overwrite)
    loaded = load_model(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    told(f"loaded {request.path}: {loaded.source.kind}")
    model, inputs = loaded.model, few(request_inputs(request, loaded))
    if model is None:
        raise UsageError(
            "optimum-quanto quantizes a model, not tensors alone",
            where=request.path,
            fix="--model package.module:factory names the architecture",
        )
    if inputs is None:
        raise UsageError(
            "no inputs are known to verify the folder with",
            where=request.path,
            fix="--input or --calib",
        )
    with eval_mode(model):
        run(model, inputs)  # a clear error about the inputs, before anything is paid for
    qmodel, report = _quantize(model, kind, request, progress)
    fill_outputs(report, model, qmodel, inputs)
    report.remarks += loaded.source.notes
    if not request.dry_run:
        fill_latency(report, model, qmodel, inputs)
    check_budgets(report, min_coverage=request.min_coverage, min_sqnr=request.min_sqnr)
    if request.dry_run:
        report.remarks.append("dry run: nothing was written")
        fill_cost(report, start)
        return report
    told(f"writing {out} and verifying it in a fresh process")
    _save(qmodel, out, report, inputs, loaded, request, start)
    return report


def _resolve(request: Request) -> str:
    """The type of the weights; refused here if quanto cannot do what is asked."""
    kind = _NAMES.get(request.scheme, request.scheme)
    if kind not in TYPES:
        raise UsageError(
            "not a type of optimum-quanto's weights",
            got=repr(request.scheme),
            wanted=", ".join(["qfloat8", *TYPES]),
        )
    asked = {
        "--algorithm": (request.algorithm, AUTO),
        "--group-size": (request.group_size, None),
        "--target": (request.target, "torch"),
        "--format": (request.format, "qkit"),
    }
    for option, (value, default) in asked.items():
        if value != default:
            raise UsageError(
                f"{option} is for qkit's own quantization",
                got=f"--backend quanto {option} {value}",
                fix=f"leave out {option}",
            )
    if package_version(DISTRIBUTION) is None:
        raise MissingExtraError(DISTRIBUTION, "quanto", needed_for="--backend quanto")
    _quanto()
    return kind


def _quanto() -> Any:
    """The library: a torchvision that does not fit torch, for instance, breaks its import."""
    try:
        return importlib.import_module("optimum.quanto")
    except Exception as error:  # of whatever it imports
        raise RequestError(
            "optimum-quanto is installed and cannot be imported",
            got=first_line(error, 200),
            fix="see: qkit doctor",
        ) from error


def _quantize(
    model: nn.Module, kind: str, request: Request, progress: Progress
) -> tuple[nn.Module, Report]:
    quanto = _quanto()
    # The recipe says which layers; its scheme, that they are layers with a quantized weight.
    recipe = Recipe.simple(parse("w8a16"), request.ignore)
    plans = plan_layers(model, recipe, _obstacle_in(model))
    chosen = [plan.entry for plan in plans if plan.rule is not None]
    for entry in chosen:
        check_finite(_weight(entry), entry.name)
    qmodel = copy.deepcopy(model)
    if kind in BITS:
        _check_unpack()
    try:
        quanto.quantize(qmodel, weights=kind, include=[glob.escape(e.name) for e in chosen])
        quanto.freeze(qmodel)
    except Exception as error:  # of a library that checks little
        raise RequestError(
            "optimum-quanto fails on the model",
            where=request.path,
            got=first_line(error, 200),
            fix="another type of weights, or --ignore a layer",
        ) from error
    _check_values(qmodel, [entry.name for entry in chosen], kind)
    rows = []
    for done, plan in enumerate(plans, 1):
        rows.append(_row(plan, kind, qmodel))
        progress(done, len(plans), plan.entry.name)
    report = new_report(parse("w8a16"), QUANTO, recipe, rows)
    version = package_version(DISTRIBUTION)
    report.scheme, report.scheme_long = kind, f"{kind}: weights by optimum-quanto {version}"
    report.recipe = {"backend": QUANTO, "weights": kind, "ignore": list(request.ignore)}
    report.versions |= {DISTRIBUTION: str(version)}
    if kind == "qint8" and any(_weight(entry).dtype == torch.bfloat16 for entry in chosen):
        report.remarks.append(BF16_CRASH)
    fill_size(report, tensor_bytes(model.state_dict()), tensor_bytes(_state(qmodel)))
    return qmodel, report


def _obstacle_in(model: nn.Module) -> Callable[[Entry, Scheme], str | None]:
    """Why quanto does not quantize a layer of ``model`` (rightly)."""
    paths: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        paths[id(module)] = paths.get(id(module), 0) + 1

    def obstacle(entry: Entry, scheme: Scheme) -> str | None:
        if entry.inside is not None or type(entry.module) not in (nn.Linear, nn.Conv2d):
            what = entry.note or entry.inside_kind or entry.kind
            return f"optimum-quanto has no quantized {what}"
        if paths[id(entry.module)] > 1:
            return "used at several places, of which optimum-quanto replaces one"
        if not entry.name:
            return "the model is a single layer: optimum-quanto replaces layers inside a model"
        return None

    return obstacle


def _check_unpack() -> None:
    """quanto compiles the operator that unpacks 4 and 2 bits when it is first used."""
    try:
        torch.ops.quanto.unpack(torch.zeros(1, 1, dtype=torch.uint8), 4)
    except Exception as error:  # whatever a compiler says
        raise RequestError(
            "optimum-quanto could not compile its operator for 4 and 2 bits",
            got=first_line(error, 200),
            fix="a C++ compiler and ninja on the PATH, or qint8 or qfloat8",
        ) from error


def _check_values(qmodel: nn.Module, names: list[str], kind: str) -> None:
    """quanto divides a row of zeros by its scale, which is zero: the floats are NaN then."""
    layers: dict[str, Any] = {name: qmodel.get_submodule(name) for name in names}
    bad = [n for n, m in layers.items() if not torch.isfinite(m.weight.dequantize()).all()]
    if bad:
        raise RequestError(
            f"optimum-quanto makes NaN of weights as {kind}: of a row of zeros, for instance",
            got=", ".join(bad),
            fix=" ".join(f"--ignore {name}" for name in bad) + ", or qint8",
        )


def _row(plan: Plan, kind: str, qmodel: nn.Module) -> LayerRow:
    if plan.rule is None:
        return left_row(plan.entry, plan.reason)
    layer: Any = qmodel.get_submodule(plan.entry.name)
    weight = _weight(plan.entry)
    stored = {k: t for k, t in layer.state_dict().items() if k.startswith("weight.")}
    groups = stored["weight._scale"].numel() // max(len(weight), 1)
    notes = [f"groups of {weight[0].numel() // groups}"] if groups > 1 else []
    if plan.entry.tied_to:
        notes.append(f"no longer shared with {plan.entry.tied_to}")
    return quantized_row(
        plan.entry,
        kind,
        QUANTO,
        8 * tensor_bytes(stored) / weight.numel(),
        tensor_sqnr_db(weight, layer.weight.dequantize().detach()),
        "; ".join(notes) or None,
    )


def _weight(entry: Entry) -> Tensor:
    weight = entry.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _state(qmodel: nn.Module) -> dict[str, Tensor]:
    """The plain tensors that quanto stores."""
    return {name: tensor.detach() for name, tensor in qmodel.state_dict().items()}


def _save(
    qmodel: nn.Module,
    out: Path,
    report: Report,
    inputs: Inputs,
    loaded: Loaded,
    request: Request,
    start: float,
) -> None:
    source, builder = loaded.source, loaded.builder
    inputs = for_dtype(inputs, qmodel)
    with staged(out, overwrite=request.overwrite) as folder, eval_mode(qmodel):
        if (builder or {}).get("kind") == "transformers":
            from optimum.quanto.models.transformers_models import QuantizedTransformersModel

            copy_config(Path(source.path), folder, config_name="config.json")
            # Behind save_pretrained, which would add an empty model card.
            QuantizedTransformersModel(qmodel)._save_pretrained(folder)
        else:
            save_tensors(_state(qmodel), folder / WEIGHTS)
            text = json.dumps(_quanto().quantization_map(qmodel), indent=4)
            (folder / QUANTO_MAPS[1]).write_text(text + "\n", encoding="utf-8")
        meta = head(report, source, builder, target=QUANTO)
        extra = [n for n in read_tensors(folder / WEIGHTS) if n.endswith(("_scale", "_shift"))]
        meta |= {"layers": {}, "aliases": {}, "buffers": sorted(extra)}
        save_tensors(model_check(qmodel, inputs), folder / CHECK)
        result = verify_runtime(
            write_meta(folder, meta),
            "quanto",
            DISTRIBUTION,
            model=request.model,
            source=source.path if builder is None else None,
            trust_pickle=request.trust_pickle,
        )
        (folder / CHECK).unlink()
        write_meta(folder, meta)
        complete(report, result, folder, source, out, start)
