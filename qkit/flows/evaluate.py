"""What the quantized model does beside the float one: error, latency, kernels, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkit import ops
from qkit.errors import InputError, UsageError
from qkit.models import Inputs, run, split
from qkit.nn.recurrent import OpenRecurrent
from qkit.report import (
    LayerRow,
    Report,
    compare,
    coverage,
    machine,
    measure,
    peak_rss_bytes,
    versions,
)
from qkit.spec import Recipe, Scheme
from qkit.targets import QUANTO

# Below this, a reader should look at the rows before trusting the result.
LOW_SQNR_DB = 15.0
LARGE_ERROR = "the output error is large"
MAX_SLOWDOWN = 1.0
# Of much calibration data, this is enough to judge by and like a batch that is served.
COMPARED_SAMPLES = 64


AnyInputs = Inputs | Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def as_inputs(given: AnyInputs) -> Inputs:
    """Inputs from what a user has: a tensor, a sequence (positional) or a mapping (by name)."""
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Tensor):
        return Inputs((given,), {}, "given by the caller")
    if isinstance(given, Mapping):
        return Inputs((), dict(given), "given by the caller")
    args = tuple(given)
    if not all(isinstance(t, Tensor) for t in args):
        raise UsageError("inputs are tensors", got=", ".join(type(t).__name__ for t in args))
    return Inputs(args, {}, "given by the caller")


def few(inputs: Inputs | None) -> Inputs | None:
    """The samples that both models are compared and timed on: the first ones, if there are many."""
    if inputs is None:
        return None
    part = split(inputs, COMPARED_SAMPLES)
    cut = any(a.shape != b.shape for a, b in zip(_tensors(inputs), _tensors(part), strict=True))
    return replace(part, origin=f"{part.origin}, the first {COMPARED_SAMPLES}") if cut else inputs


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [*inputs.args, *inputs.kwargs.values()]


def new_report(scheme: Scheme, target: str, recipe: Recipe, rows: list[LayerRow]) -> Report:
    """A report with everything that is known before the model is run."""
    return blank_report(scheme.name, scheme.long_form(), target, recipe.to_json(), rows)


def blank_report(
    scheme: str, long_form: str, target: str, recipe: dict[str, Any], rows: list[LayerRow]
) -> Report:
    """:func:`new_report` of what no scheme names."""
    return Report(
        scheme=scheme,
        scheme_long=long_form,
        target=target,
        layers=rows,
        coverage=coverage(rows),
        recipe=recipe,
        versions=versions(),
        machine=machine(),
        verification={
            "status": "not run",
            "level": None,
            "runtime": None,
            "fresh_process": False,
        },
    )


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of a state dict's values."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Sized(Protocol):
    """A report with sizes and the cost of the run."""

    size_bytes: dict[str, Any]
    seconds: float
    peak_rss_bytes: int


def fill_size(report: Sized, source: int, artifact: int) -> None:
    """The bytes of the model before and after, and their ratio."""
    ratio = round(artifact / source, 4)
    report.size_bytes |= {"source": source, "artifact": artifact, "ratio": ratio}


def for_dtype(inputs: Inputs, model: nn.Module) -> Inputs:
    """``inputs`` with float tensors in the dtype of the first float parameter of ``model``."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and dtype else tensor

    return replace(
        inputs,
        args=tuple(fit(t) for t in inputs.args),
        kwargs={name: fit(t) for name, t in inputs.kwargs.items()},
    )


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode inside the block, as they were behind it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            with suppress(NotImplementedError):  # a torch.export program, which has no modes
                model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def fill_outputs(report: Report, model: nn.Module, qmodel: nn.Module, inputs: Inputs) -> None:
    """Run both models once; fill in the error of the outputs and the kernels that ran.

    Where sizes of the outputs depend on values (a predicted length) and differ, the error is that
    of the weights. Raises :class:`~qkit.errors.InputError` if the float model's output is not
    finite: then no error could be judged.
    """
    with eval_mode(model, qmodel):
        reference = run(model, inputs)
        bad = sum(int((~torch.isfinite(t)).sum()) for t in reference if t.is_floating_point())
        if bad:
            raise InputError(
                "the float model's own output is not finite",
                got=f"{bad} values",
                where=inputs.origin,
                fix="give real inputs with --input or --calib",
            )
        with ops.count_calls() as calls:
            outputs = run(qmodel, for_dtype(inputs, qmodel))
    report.kernels = dict(sorted(calls.items()))
    if [t.dim() for t in reference] == [t.dim() for t in outputs] and any(
        a.shape != b.shape for a, b in zip(reference, outputs, strict=True)
    ):
        fill_weight_error(report, OTHER_SIZES)
        return
    stats = compare(reference, outputs)
    report.error = stats.to_json() | {"level": "model", "inputs": inputs.origin}
    if stats.sqnr_db is not None and stats.sqnr_db < LOW_SQNR_DB:
        report.remarks.append(
            f"{LARGE_ERROR} (SQNR {stats.sqnr_db:.1f} dB): see the layers' SQNR, "
            "take more bits or smaller groups, give real inputs (--calib) to learn from, or keep "
            "the worst layers with --ignore"
        )


def fill_comparison(
    report: Report,
    model: nn.Module,
    qmodel: nn.Module,
    inputs: Inputs | None,
    *,
    latency: bool,
) -> None:
    """Error and, if asked for, latency beside the float ``model``; without ``inputs`` the error of
    the weights."""
    if inputs is None:
        fill_weight_error(report)
        return
    fill_outputs(report, model, qmodel, inputs)
    if latency:
        fill_latency(report, model, qmodel, inputs)


NO_INPUTS = (
    "no inputs are known, so outputs were not compared and nothing was timed; the error is the "
    "worst layer's weight SQNR (give --input, --calib or --model)"
)


OTHER_SIZES = (
    "the outputs have other sizes than the float model's, because sizes depend on values in this "
    "model (a predicted length, say), so they were not compared; the error is the worst layer's "
    "weight SQNR"
)


def fill_weight_error(report: Report, remark: str = NO_INPUTS) -> None:
    """Where outputs are not compared, the error is that of the worst layer's weight."""
    values = [row.sqnr_db for row in report.layers if row.scheme and row.sqnr_db is not None]
    report.error = {
        "sqnr_db": min(values, default=None),
        "cosine": None,
        "max_abs": None,
        "level": "weights",
        "inputs": None,
    }
    report.remarks.append(remark)


def fill_latency(
    report: Report, model: nn.Module, qmodel: nn.Module, inputs: Inputs, *, seconds: float = 3.0
) -> None:
    """Time both models, interleaved, on ``inputs``."""
    quantized_inputs = for_dtype(inputs, qmodel)
    with eval_mode(model, qmodel):
        times = measure(
            {
                "float": lambda: run(model, inputs),
                "quantized": lambda: run(qmodel, quantized_inputs),
            },
            seconds=seconds,
        )
    speedup = times["float"].median / times["quantized"].median
    report.latency_ms = {name: latency.to_json() for name, latency in times.items()} | {
        "speedup": round(speedup, 3),
        "threads": torch.get_num_threads(),
        "runtime": "torch eager",
    }
    if speedup <= MAX_SLOWDOWN:
        report.remarks.append(_why_slow(report, speedup, model) + _steps(qmodel))


def _why_slow(report: Report, speedup: float, model: nn.Module) -> str:
    text = f"not faster: {speedup:.2f}x the float model's speed in torch eager"
    plain = [name.partition("[")[0] for name in report.kernels if "[reference]" in name]
    if plain:
        text += (
            f", because the reference operators ({', '.join(plain)}) unpack their weights to float "
            "at every call; what is won is size and memory"
        )
    elif any(n.startswith("qkit::convolution") and "kept" not in n for n in report.kernels):
        text += (
            ", because convolutions unpack their weights at every call and leave the arithmetic to "
            "torch; what is won is size and memory (--runtime-cache keeps the weights unpacked)"
        )
    elif report.target == QUANTO:
        text += (
            ", because optimum-quanto's layers ran, not qkit's: on a CPU most of them unpack their "
            "weights to float at every call"
        )
    elif report.coverage.get("done") == "factorized":
        text += ", because a layer in parts takes more calls; what is won is parameters and work"
    elif report.kernels:
        text += (
            ", although native kernels ran: with so little work in each layer, what they save is "
            "less than what a call costs"
        )
    elif any(row.algorithm for row in report.layers):
        text += ", because no quantized layer ran on these inputs"
    else:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        text += f", because {report.scheme} is computed here no faster than {str(dtype)[6:]}"
    return text


def _steps(qmodel: nn.Module) -> str:
    """What recurrent modules add to that: torch's own do not come back to Python at every step."""
    kinds = {m.opened_from for m in qmodel.modules() if isinstance(m, OpenRecurrent)}
    return f"; an opened {' or '.join(sorted(kinds))} takes its steps in Python" if kinds else ""


def fill_cost(report: Sized, start: float) -> None:
    """Seconds since ``start`` (of ``time.perf_counter``) and this process's peak memory."""
    report.seconds = round(time.perf_counter() - start, 3)
    report.peak_rss_bytes = peak_rss_bytes()
