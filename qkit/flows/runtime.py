"""Running a lowered artifact in a fresh process, and judging what comes out.

The runtime rounds the same values to the same codes as the converted program in torch, but sums in
another order; a sum that lies between two codes may fall to the other side, and such a difference
spreads. ONNX Runtime's LSTM even takes ranges for the part of the batch that a thread has. What
quantization itself changed is the natural measure, because two roundings of the same values that
know nothing of each other differ by twice the noise of one: more than that (:data:`MAX_DRIFT`) is
another program, unless it is the rounding of floats (:data:`~qkit.report.metrics.BOUNDS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import UnsafeCodeError, VerificationError
from qkit.flows.check import expected, inputs_of
from qkit.flows.verify import fresh_process
from qkit.report import compare, measure
from qkit.report.metrics import BOUNDS
from qkit.targets import TARGETS
from qkit.targets.artifact import CHECK, Artifact
from qkit.targets.backend import Backend, backend
from qkit.targets.weights import read_tensors, save_tensors

# Noise power of the artifact against the converted program, over that of quantization itself.
MAX_DRIFT = 2.0
FLOAT = "float"


def run_fresh(
    artifact: Artifact, target: str, *, rival: Path | None = None, seconds: float = 3.0
) -> tuple[list[Tensor], dict[str, Any]]:
    """The outputs of the artifact in a fresh process, and ``latency_ms`` beside the float model in
    the file ``rival``, both in the target's runtime.

    Raises :class:`~qkit.errors.VerificationError` if it cannot be loaded or run.
    """
    job = {
        "artifact": str(artifact.path.absolute()),
        "ways": [target],
        "runtime": target,
        "rival": rival and str(rival.absolute()),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    outputs, facts = fresh_process(job, artifact)
    return [outputs[f"{target}.{i}"] for i in range(len(outputs))], facts


def work(job: dict[str, Any], artifact: Artifact) -> None:
    """The fresh process's part of :func:`run_fresh`: load, run, time, write."""
    runtime, threads = backend(job["runtime"]), job["threads"]
    inputs = inputs_of(artifact)
    session = runtime.load(artifact.path / runtime.file, threads)
    results = session(inputs.args, inputs.kwargs)
    facts: dict[str, Any] = {}
    if job["rival"]:
        other = runtime.load(Path(job["rival"]), threads)
        times = measure(
            {
                "float": lambda: other(inputs.args, inputs.kwargs),
                "quantized": lambda: session(inputs.args, inputs.kwargs),
            },
            seconds=job["seconds"],
        )
        facts["latency_ms"] = {name: latency.to_json() for name, latency in times.items()}
    out = Path(job["out"])
    tensors = {f"{job['runtime']}.{i}": t.contiguous() for i, t in enumerate(results)}
    save_tensors(tensors, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def references(artifact: Artifact) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of the converted program and of the float model in the check file."""
    found = expected(artifact)
    floats = {
        name: tensor
        for name, tensor in read_tensors(artifact.path / CHECK).items()
        if name.startswith(f"{FLOAT}.")
    }
    return _in_order(found, "module"), _in_order(floats, FLOAT)


def _in_order(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    return [tensors[f"{prefix}.{i}"] for i in range(len(tensors))]


def judge(
    where: str,
    runtime: Backend,
    wanted: Sequence[Tensor],
    floats: Sequence[Tensor],
    got: Sequence[Tensor],
) -> dict[str, Any]:
    """What ``qkit verify`` returns; :class:`~qkit.errors.VerificationError` if it is not so."""
    shapes = [[(t.dtype, tuple(t.shape)) for t in tensors] for tensors in (got, wanted)]
    if shapes[0] != shapes[1]:
        raise VerificationError(
            "the runtime gives other outputs", where=where, got=shapes[0], wanted=shapes[1]
        )
    worst, drift, identical = 0.0, 0.0, True
    for index, (want, exact, have) in enumerate(zip(wanted, floats, got, strict=True)):
        identical = identical and torch.equal(want, have)
        stats, rounding = compare([want], [have]), compare([exact], [want])
        error = stats.max_abs / stats.max_ref if stats.max_ref else stats.max_abs
        worst = max(worst, error)
        if error <= BOUNDS.get(want.dtype, 0.0):
            continue
        share = _noise(want, have) / max(_noise(exact, want), 1e-300)
        if not share <= MAX_DRIFT or rounding.sqnr_db is None:
            raise VerificationError(
                f"the runtime does not reproduce output {index}",
                where=where,
                got=f"a relative error of {error:.3g}, {share:.3g} of the noise of quantization",
                wanted=f"at most {MAX_DRIFT:g} of it, or {BOUNDS.get(want.dtype, 0.0):.3g}",
            )
        drift = max(drift, share)
    check = {
        "way": runtime.file,
        "bit_identical": identical,
        "max_rel_error": worst,
        "drift": drift,
    }
    return {
        "status": "verified",
        "level": "model",
        "runtime": runtime.runtime(),
        "fresh_process": True,
        "bit_identical": identical,
        "max_rel_error": worst,
        "checks": [check],
    }


def _noise(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def verify_file(
    path: Path, target: str, *, dialect: str | None = None, trusted: bool = False
) -> dict[str, Any]:
    """:func:`qkit.verify` of a file of the runtime alone, with no outputs to compare with.

    It is loaded and run on made-up inputs, or held against the rules of ``dialect``. Returns what
    :func:`qkit.verify` does, with ``kernels`` or ``rules``; raises
    :class:`~qkit.errors.InputError` for a file that is corrupt, and
    :class:`~qkit.errors.VerificationError` if it computes nothing finite or breaks a rule.
    """
    runtime = backend(target)
    runtime.check(None, {"dialect": dialect})
    facts = runtime.probe(path, dialect, trusted)
    check = {"way": path.name, "bit_identical": False, "max_rel_error": None}
    return {
        "status": "verified",
        "level": "file",
        "runtime": runtime.runtime(),
        "fresh_process": False,
        "bit_identical": False,
        "max_rel_error": None,
        "checks": [check],
    } | facts


def verify_lowered(artifact: Artifact, target: str, *, trusted: bool = False) -> dict[str, Any]:
    """:func:`qkit.verify` of an artifact of a target of the PT2E flow.

    The hashes in it say that it is whole, not who made it: native code is run where it is
    ``trusted``.
    """
    if TARGETS[target].native and not trusted:
        raise UnsafeCodeError(str(artifact.path))
    outputs, _ = run_fresh(artifact, target)
    wanted, floats = references(artifact)
    return judge(str(artifact.path), backend(target), wanted, floats, outputs)
