"""``qkit quantize --target``: what the options of a run say, for :func:`qkit.flows.lower.lower`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qkit.errors import UsageError
from qkit.flows.data import Data, open_data
from qkit.flows.lower import check_request, known_target, lower, requested
from qkit.flows.ptq import Progress, no_progress
from qkit.flows.qat import Qat, trained_scheme
from qkit.flows.quantize import Request, default_output
from qkit.flows.source import module_of, open_source, request_inputs
from qkit.flows.train import TrainRequest
from qkit.graph.sites import when
from qkit.models import Inputs, Loaded
from qkit.report import Report
from qkit.targets.backend import backend
from qkit.targets.staging import check_destination


def lower_file(
    request: Request,
    *,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """:func:`lower` of the model in a file; raises what :func:`qkit.models.load` raises too."""
    scheme = trained_scheme(request.scheme)
    if (scheme is None) != (request.training is None):
        raise UsageError(
            "quantization-aware training takes a scheme and data",
            got=f"--scheme {request.scheme}" + (" --train" if request.training else ""),
            wanted="--scheme int8-qat --train DATA",
        )
    recipe = requested(
        scheme or request.scheme,
        request.ignore,
        request.algorithm,
        calibrated=bool(request.calib or request.training),
    )
    options = _options(request)
    runtime = backend(known_target(request.target))
    main = check_request(recipe, runtime, options)
    out = Path(request.output or f"{default_output(request.path, main.name)}-{request.target}")
    check_destination(out, overwrite=request.overwrite)
    if when(main) == "static" and not request.calib and request.training is None:
        raise UsageError(
            "static ranges of activations are learnt from data",
            fix="--calib FILE.npz with real inputs, or --scheme int8-dynamic",
        )
    loaded = open_source(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    told(f"loaded {request.path}: {loaded.source.kind}")
    model = module_of(loaded, "cannot be captured as a graph")
    qat = None if request.training is None else _qat(request.training, loaded, out)
    report = lower(
        model,
        recipe,
        None if request.dry_run else out,
        target=request.target,
        calib=None if qat and not request.calib else _data(request, loaded),
        qat=qat,
        observer=request.observer,
        dims=parse_dims(request.dynamic),
        options=options,
        source=loaded.source,
        overwrite=request.overwrite,
        min_coverage=request.min_coverage,
        min_sqnr=request.min_sqnr,
        calib_report=request.calib_report,
        goal_sqnr=request.goal_sqnr,
        details=request.details,
        progress=progress,
        told=told,
    )
    report.remarks += loaded.source.notes
    if request.dry_run:
        report.remarks.append("dry run: nothing was written")
    return report


def _qat(training: TrainRequest, loaded: Loaded, out: Path) -> Qat:
    """The training that a request asks for, with its data."""
    data, val = training.data(loaded.model)
    return Qat(
        data,
        val,
        options=training.options,
        **dict[str, Any](training.scored),
        folder=training.folder(out),
        resume=training.resume,
        freeze_ranges=training.freeze_ranges,
        freeze_norms=training.freeze_norms,
        teacher=training.teacher or 0.0,
        temperature=training.temperature,
        lsq=training.lsq,
        origin={"source": loaded.source.files},
    )


def parse_dims(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """``input.1=length`` -> ``{"input": {1: "length"}}``."""
    dims: dict[str, dict[int, str]] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)\.(\d+)=([A-Za-z_]\w*)", text)
        if match is None:
            raise UsageError(
                "not a dynamic dimension", got=repr(text), wanted="INPUT.DIMENSION=NAME"
            )
        dims.setdefault(match[1], {})[int(match[2])] = match[3]
    return dims


def parse_bounds(texts: Sequence[str]) -> dict[str, int]:
    """``batch=16`` -> ``{"batch": 16}``."""
    bounds = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(\d+)", text)
        if match is None:
            raise UsageError("not the bound of a dimension", got=repr(text), wanted="NAME=SIZE")
        bounds[match[1]] = int(match[2])
    return bounds


def _options(request: Request) -> dict[str, Any]:
    for option, value, default in (
        ("--format", request.format, "qkit"),
        ("--group-size", request.group_size, None),
        ("--runtime-cache", request.runtime_cache, False),
    ):
        if value != default:
            raise UsageError(f"{option} is for --target torch", got=f"{option} {value}")
    options: dict[str, Any] = {"dialect": request.dialect, "accuracy_level": request.accuracy_level}
    options["bounds"] = parse_bounds(request.bound)
    return {name: value for name, value in options.items() if value}


def _data(request: Request, loaded: Loaded) -> Data | Inputs:
    if request.calib and not request.input:
        return open_data(request.calib, loaded.model, request.image)
    inputs = request_inputs(request, loaded)
    if inputs is None:
        raise UsageError(
            "no inputs are known to capture the model with", fix="--input SHAPE or --calib FILE.npz"
        )
    return inputs
