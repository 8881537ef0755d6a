"""A model for a runtime in float: written, and proved by that runtime, as :mod:`qkit.flows.lower`
does it with quantized ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkit.flows.check import recorded, small
from qkit.flows.evaluate import (
    COMPARED_SAMPLES,
    AnyInputs,
    as_inputs,
    blank_report,
    eval_mode,
    fill_cost,
    fill_size,
    tensor_bytes,
)
from qkit.flows.lower import check_floats, known_target
from qkit.flows.rows import left_row
from qkit.flows.runtime import FLOAT, judge, run_fresh
from qkit.flows.save import fill_files, head, write_report
from qkit.graph import capture
from qkit.graph.capture import Dims
from qkit.models import Source, run, split
from qkit.nn import survey
from qkit.report import Report, compare, measure
from qkit.spec import parse, steps_recipe
from qkit.targets.artifact import CHECK, write_meta
from qkit.targets.backend import backend
from qkit.targets.staging import check_destination, staged
from qkit.targets.weights import save_tensors


def check_float(target: str, options: Mapping[str, Any]) -> None:
    """Refuse what is missing to write a model for ``target``: what int8 would need too."""
    backend(known_target(target)).check(parse("int8-dynamic"), options)


def lower_float(
    model: nn.Module,
    path: str | Path,
    inputs: AnyInputs,
    *,
    target: str = "onnx",
    dims: Dims | None = None,
    options: Mapping[str, Any] | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write the float ``model`` (pruned or factorized, say) for ``target`` as the artifact
    ``path``.

    ``inputs`` are what it is captured, compared and timed on; other arguments are those of
    :func:`qkit.flows.lower`. The artifact appears once the target's runtime has loaded it in a
    fresh process and reproduced the model's outputs up to the rounding of sums
    (:data:`qkit.report.metrics.BOUNDS`), else :class:`~qkit.errors.VerificationError` is raised.
    """
    start, out, options = time.perf_counter(), Path(path), dict(options or {})
    check_float(target, options)
    check_destination(out, overwrite=overwrite)
    check_floats(model, target)
    runtime, given = backend(target), split(as_inputs(inputs), COMPARED_SAMPLES)
    with eval_mode(model):
        floats = run(model, given)  # a clear error about the inputs, before anything is paid for
        captured = capture(model, given.args, given.kwargs, dims=dims)
        if captured.shapes is not None:
            given = small(given)
            floats = run(model, given)
        tensors = recorded(model, given) | {f"{FLOAT}.{i}": t.clone() for i, t in enumerate(floats)}
    report = blank_report(
        FLOAT,
        f"fp32, for {target}",
        target,
        steps_recipe({"export": {"target": target, "scheme": None}}),
        [left_row(entry, f"exported to {target} in float") for entry in survey(model)],
    )
    report.remarks += captured.notes
    told(f"writing {out} and verifying it in a fresh process")
    with staged(out, overwrite=overwrite) as folder:
        file = folder / runtime.file
        runtime.export_float(captured, file)
        save_tensors({name: t.contiguous() for name, t in tensors.items()}, folder / CHECK)
        meta = head(report, source, None, target=target) | {"options": options}
        outputs, _ = run_fresh(write_meta(folder, meta), target)
        report.verification = judge(str(out), runtime, floats, floats, outputs)
        error = compare(floats, outputs).to_json()
        report.error = error | {"level": "model", "inputs": given.origin}
        session = runtime.load(file, torch.get_num_threads())
        with eval_mode(model):
            calls = {"eager": lambda: run(model, given)}
            calls |= {"float": lambda: session(given.args, given.kwargs)}
            times = measure(calls)
        report.latency_ms = {name: time.to_json() for name, time in times.items()} | {
            "speedup": round(times["eager"].median / times["float"].median, 3),
            "threads": torch.get_num_threads(),
            "runtime": runtime.runtime(),
        }
        fill_size(report, tensor_bytes(model.state_dict()), file.stat().st_size)
        fill_files(report, source, file.stat().st_size, out)
        fill_cost(report, start)
        write_report(report, folder)
    return report
