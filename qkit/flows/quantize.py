"""``qkit quantize``: from a model (in memory or in a file) to a verified artifact and a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import InputError, RequestError, UsageError
from qkit.flows.algorithm import AUTO, check_algorithms, resolve_algorithm
from qkit.flows.casts import cast_module
from qkit.flows.coded import save_coded
from qkit.flows.data import gathered
from qkit.flows.details import fill_details
from qkit.flows.evaluate import (
    AnyInputs,
    as_inputs,
    eval_mode,
    few,
    fill_comparison,
    fill_cost,
    fill_size,
    new_report,
    tensor_bytes,
)
from qkit.flows.export import compressed_obstacle, save_compressed_tensors, save_gguf
from qkit.flows.ptq import Obstacle, Progress, no_obstacle, no_progress, quantize_module
from qkit.flows.save import check_budgets, save
from qkit.flows.source import open_source, request_inputs
from qkit.flows.train.request import TrainRequest
from qkit.models import Inputs, Loaded, infer, run
from qkit.nn import keep_floats, tree
from qkit.packing import container
from qkit.report import Report
from qkit.spec import Float, Recipe, Scheme, parse
from qkit.spec.plain import show
from qkit.targets import CODED, COMPRESSED, GGUF, check_format, coded, compressed_tensors, gguf
from qkit.targets import check as check_target
from qkit.targets.staging import check_destination, check_file_destination


def resolve_recipe(
    scheme: str | Scheme | Recipe,
    *,
    ignore: Sequence[str] = (),
    group_size: int | None = None,
    target: str = "torch",
    algorithm: str = AUTO,
    calibrated: bool = False,
) -> tuple[Scheme, Recipe]:
    """The scheme and the recipe of a request, refused here if they cannot be followed."""
    if isinstance(scheme, Recipe):
        schemes = [rule.scheme for rule in scheme.rules if rule.scheme is not None]
        if not schemes:
            raise UsageError("the recipe quantizes nothing: no rule has a scheme")
        main, recipe = schemes[-1], scheme
    else:
        if not isinstance(scheme, str | Scheme):
            raise UsageError("a scheme is a name", got=show(scheme), fix="see: qkit schemes")
        main = parse(scheme, group_size) if isinstance(scheme, str) else scheme
        algorithm = resolve_algorithm(main, algorithm, calibrated=calibrated)
        schemes, recipe = [main], Recipe.simple(main, ignore, algorithm=algorithm)
    check_algorithms(recipe, calibrated=calibrated)
    for each in schemes:
        check_target(target, each)
    if any(each.casts_model for each in schemes) and len(recipe.rules) > 1:
        raise UsageError(
            "a cast applies to the whole model: its layers exchange activations of that type",
            got=f"{main.name} with {len(recipe.rules)} rules",
            fix="leave out --ignore, or use a weight-only scheme",
        )
    return main, recipe


def quantize(
    model: nn.Module,
    scheme: str | Scheme | Recipe = "w8a16",
    *,
    ignore: Sequence[str] = (),
    group_size: int | None = None,
    inputs: AnyInputs | None = None,
    calib: str | Path | AnyInputs | None = None,
    algorithm: str = AUTO,
    in_place: bool = False,
    runtime_cache: bool = False,
    target: str = "torch",
    latency: bool = True,
    details: bool = False,
    progress: Progress = no_progress,
) -> tuple[nn.Module, Report]:
    """Quantize ``model``; return the quantized model and the report.

    ``scheme`` is a name (``"w8a16"``, ``"w4a16-g32"``, ...), a Scheme or a Recipe. ``ignore``
    lists layers to leave: full names (with everything below them), class names or
    ``re:<pattern>``. ``inputs`` (a tensor, a sequence or a mapping of tensors) are run through
    both models for the report's error and latency; without them, the inputs are inferred from the
    first layer where that works. ``calib`` is such inputs too, or what ``--calib`` names
    (:func:`qkit.flows.data.open_data`), but real ones: the algorithm may learn from them.
    ``algorithm`` is ``rtn`` (round to nearest), ``gptq`` (needs ``calib``) or ``auto``: ``gptq``
    for fewer than 8 bits where there is ``calib``, else ``rtn``.
    ``model`` is not changed unless ``in_place``. ``runtime_cache`` lets convolutions keep their
    weights in float between calls. ``details`` measures what :func:`qkit.write_report` shows
    besides: histograms of weights, and the time in each layer.

    Raises :class:`~qkit.errors.UsageError` for an unknown scheme, algorithm or name,
    :class:`~qkit.errors.RequestError` if the target cannot express the scheme,
    :class:`~qkit.errors.InputError` for weights that are not finite and
    :class:`~qkit.errors.CoverageError` if nothing can be quantized.
    """
    start = time.perf_counter()
    main, recipe = resolve_recipe(
        scheme,
        ignore=ignore,
        group_size=group_size,
        target=target,
        algorithm=algorithm,
        calibrated=calib is not None,
    )
    if inputs is not None and calib is not None:
        raise UsageError("give inputs or calib, not both")
    given: Inputs | None
    if isinstance(calib, str | Path):
        given = gathered(str(calib), model)
    elif calib is not None:
        given = as_inputs(calib)
    else:
        given = infer(model) if inputs is None else as_inputs(inputs)
    return _quantize(
        model,
        main,
        recipe,
        few(given),
        calib=given if calib is not None else None,
        in_place=in_place,
        runtime_cache=runtime_cache,
        latency=latency,
        details=details,
        progress=progress,
        start=start,
    )


def _quantize(
    model: nn.Module,
    scheme: Scheme,
    recipe: Recipe,
    inputs: Inputs | None,
    *,
    calib: Inputs | None,
    in_place: bool,
    runtime_cache: bool,
    latency: bool,
    details: bool,
    progress: Progress,
    start: float,
    obstacle: Obstacle = no_obstacle,
) -> tuple[nn.Module, Report]:
    if inputs is not None:
        with eval_mode(model):
            run(model, inputs)  # a clear error about the inputs, before anything is paid for
    float_bytes = tensor_bytes(model.state_dict())
    if scheme.casts_model and isinstance(scheme.weight.format, Float):
        qmodel, rows = cast_module(
            model, scheme.weight.format, in_place=in_place, progress=progress
        )
    else:
        qmodel, rows = quantize_module(
            model, recipe, calib=calib, in_place=in_place, progress=progress, obstacle=obstacle
        )
    report = new_report(scheme, "torch", recipe, rows)
    if runtime_cache:
        megabytes = keep_floats(qmodel) / 1e6
        report.remarks.append(
            f"runtime cache: convolutions keep their weights in float, {megabytes:.1f} MB of memory"
        )
    fill_size(report, float_bytes, tensor_bytes(qmodel.state_dict()))
    compared = None if in_place else inputs
    fill_comparison(report, model, qmodel, compared, latency=latency)
    if details and not in_place:
        fill_details(report, model, qmodel, compared, latency=latency)
    fill_cost(report, start)
    return qmodel, report


@dataclass(frozen=True)
class Request:
    """One run of ``qkit quantize`` on a file; the fields are the command's options."""

    path: str
    scheme: str = "w8a16"
    algorithm: str = AUTO
    output: str | None = None
    target: str = "torch"
    format: str = "qkit"
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    input: str | None = None
    calib: str | None = None
    model: str | None = None
    trust_pickle: bool = False
    overwrite: bool = False
    dry_run: bool = False
    min_coverage: float = 0.0
    min_sqnr: float | None = None
    seed: int = 0
    observer: str = "minmax"
    dialect: str | None = None
    accuracy_level: int = 0
    dynamic: tuple[str, ...] = ()
    runtime_cache: bool = False
    bound: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    calib_report: bool = False
    goal_sqnr: float | None = None
    details: bool = False
    training: TrainRequest | None = None


def resolve_request(request: Request) -> tuple[Scheme, Recipe]:
    """:func:`resolve_recipe` of the options of a run."""
    return resolve_recipe(
        request.scheme,
        ignore=request.ignore,
        group_size=request.group_size,
        target=request.target,
        algorithm=request.algorithm,
        calibrated=request.calib is not None,
    )


def default_output(path: str, scheme: str) -> str:
    """``model.pt`` with w8a16 is written to ``model-w8a16`` in the working directory.

    >>> default_output("models/net.pt", "w8a16")
    'net-w8a16'
    """
    name = Path(os.path.abspath(path)).name  # also of "." and of "folder/"
    stem = name if Path(path).is_dir() else Path(name).stem
    return f"{stem}-{scheme}"


def quantize_file(
    request: Request,
    *,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
    metrics: Callable[[nn.Module, nn.Module], dict[str, Any]] | None = None,
) -> Report:
    """Load, quantize, compare, time, write, verify in a fresh process; return the report.

    ``told`` receives one line for each stage. ``metrics(float_model, quantized_model)`` adds
    figures of the user's own. Raises what :func:`quantize`, :func:`qkit.models.load` and
    :func:`qkit.flows.save.save` raise; nothing is left at the output then.
    """
    start = time.perf_counter()
    scheme, recipe = resolve_request(request)
    check_format(request.format, scheme)
    out = destination(request, scheme)
    if request.format == GGUF:
        scale = gguf.scale_format(scheme)
        scheme = scheme.with_scale(scale)
        recipe = recipe.with_schemes(lambda s: s.with_scale(scale))
    told(scheme.long_form())
    loaded = open_source(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    told(f"loaded {request.path}: {loaded.source.kind}")
    model = (
        loaded.model
        if loaded.model is not None
        else _as_tree(loaded, opened=request.format in ("qkit", CODED))
    )
    data = request_inputs(request, loaded)
    inputs = few(data)
    # Layers that are left in float because the format of the output has no place for them.
    obstacle: Obstacle = gguf.layer_obstacle if request.format == GGUF else no_obstacle
    if request.format == COMPRESSED:
        _check_transformers(request, loaded, inputs, acts=scheme.input is not None)
        obstacle = compressed_obstacle(model, inputs, acts=scheme.input is not None)
        change = compressed_tensors.as_stored(model)
        scheme, recipe = change(scheme), recipe.with_schemes(change)
    qmodel, report = _quantize(
        model,
        scheme,
        recipe,
        inputs,
        calib=data if request.calib else None,
        in_place=False,
        runtime_cache=request.runtime_cache,
        latency=not request.dry_run,
        details=request.details,
        progress=progress,
        start=start,
        obstacle=obstacle,
    )
    report.target = request.target
    report.remarks += loaded.source.notes
    if metrics is not None:
        report.metrics = metrics(model, qmodel)
    check_budgets(report, min_coverage=request.min_coverage, min_sqnr=request.min_sqnr)
    if request.dry_run:
        report.remarks.append("dry run: nothing was written")
        fill_cost(report, start)
        return report
    given: dict[str, Any] = {
        "report": report,
        "source": loaded.source,
        "overwrite": request.overwrite,
        "start": start,
    }
    if request.format == GGUF:
        told(f"writing {out} and reading it back")
        save_gguf(qmodel, out, **given)
        return report
    told(f"writing {out} and verifying it in a fresh process")
    given |= {"inputs": inputs, "builder": loaded.builder}
    if request.format == CODED:
        save_coded(qmodel, out, trust_pickle=request.trust_pickle, **given)
    elif request.format == COMPRESSED:
        save_compressed_tensors(qmodel, out, **given)
    else:
        save(qmodel, out, trust_pickle=request.trust_pickle, **given)
    return report


# Formats of one file: what its name ends in where it is not given, and what it begins with.
_FILES = {GGUF: (".gguf", gguf.MAGIC), CODED: (coded.SUFFIX, container.MAGIC)}


def destination(request: Request, scheme: Scheme) -> Path:
    """Where to write, refused here if that is not possible."""
    out = Path(request.output or default_output(request.path, scheme.name))
    if request.format in _FILES:
        suffix, magic = _FILES[request.format]
        out = out if request.output else out.with_name(out.name + suffix)
        check_file_destination(out, magic, overwrite=request.overwrite)
    else:
        check_destination(out, overwrite=request.overwrite)
    return out


def _check_transformers(
    request: Request, loaded: Loaded, inputs: Inputs | None, *, acts: bool
) -> None:
    """What a folder that transformers loads is made from."""
    if (loaded.builder or {}).get("kind") != "transformers":
        raise RequestError(
            f"--format {request.format} is for Hugging Face folders with their config.json",
            where=request.path,
            got=loaded.source.kind,
            fix="--format qkit",
        )
    if inputs is None:
        raise UsageError(
            "no inputs are known to verify the folder with",
            where=request.path,
            fix="--input or --calib",
        )
    if acts and getattr(getattr(loaded.model, "config", None), "is_encoder_decoder", False):
        # Its encoder and decoder are called by themselves there, and the hook that unpacks all
        # weights is on the whole: exact activations are all that transformers could compute.
        raise RequestError(
            f"--format {request.format} has no int8 activations for encoder-decoders: "
            "transformers unpacks their weights too late to generate",
            where=request.path,
            got=request.scheme if isinstance(request.scheme, str) else None,
            fix="--scheme w8a16, or --format qkit",
        )


def _as_tree(loaded: Loaded, *, opened: bool) -> nn.Module:
    if not loaded.state_dict:
        raise InputError("the file holds no tensors", where=loaded.source.path)
    return tree(loaded.state_dict, loaded.layer_kinds, opened=opened)
