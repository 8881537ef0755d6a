"""Verification: a fresh process loads the artifact and must reproduce the stored outputs.

Bit-identical is the rule in the same environment, and is reported. What decides is a bound on the
error relative to the largest reference value, because another processor or thread count may sum
in another order: :data:`qkit.report.metrics.BOUNDS`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import InputError, QkitError, RequestError, UsageError, VerificationError
from qkit.flows.check import expected
from qkit.packing.container import is_container
from qkit.report import compare, package_version
from qkit.report.metrics import BOUNDS as BOUNDS
from qkit.targets import COMPRESSED, LOWERED, QUANTO
from qkit.targets.artifact import PROGRAM, Artifact, check_files, read_artifact
from qkit.targets.trial import fresh_command
from qkit.targets.weights import read_tensors

# The files of runtimes that are verified by themselves, and their targets.
SUFFIXES = {".onnx": "onnx", ".pte": "xnnpack", ".pt2": "inductor"}

# What went wrong in the fresh process because of how it was asked, not because of the artifact.
_REQUESTS: dict[int, type[QkitError]] = {
    kind.exit_code: kind for kind in (UsageError, RequestError)
}


def verify(
    path: str | Path,
    *,
    model: str | None = None,
    source: str | Path | None = None,
    trust_pickle: bool = False,
    trust_code: bool = False,
    dialect: str | None = None,
    runtime_cache: bool = False,
) -> dict[str, Any]:
    """Check the files of the artifact ``path``, then run it in a fresh process.

    The architecture comes from ``model`` (``package.module:factory``), from ``source`` (the model
    file that was quantized), or from the artifact itself; the ``torch.export`` program, if there
    is one, is run as well. Where neither is possible, each quantized layer is run by itself.
    A coded file carries no outputs; it is decoded, and its tensors must be those it was made of.
    An artifact of another target is run by that target's runtime. ``path`` may also be an .onnx,
    .pte or .pt2 file, which is loaded and run on made-up inputs, or, with the ``dialect``
    "tensorrt", held against the rules of TensorRT's explicit quantization. AOTInductor packages
    (.pt2, and artifacts that hold one) are native code, which is run with ``trust_code`` only.
    ``runtime_cache`` as :func:`qkit.load` takes it.

    Returns ``status`` "verified", ``level`` (model or layers), ``runtime``, ``fresh_process``,
    ``bit_identical``, ``max_rel_error`` and a list of ``checks``; for each way in which the whole
    model was run, the seconds until it was loaded and until its first output, and the bytes by
    which that process had grown then (``private``, and ``mapped`` from files). Raises
    :class:`~qkit.errors.VerificationError` if an output differs,
    :class:`~qkit.errors.InputError` if a file is missing or damaged.
    """
    if Path(path).suffix in SUFFIXES:
        from qkit.flows.runtime import verify_file

        if runtime_cache:
            raise _no_cache(path)
        target = SUFFIXES[Path(path).suffix]
        return verify_file(Path(path), target, dialect=dialect, trusted=trust_code)
    if dialect is not None:
        raise UsageError("a dialect is that of an .onnx file", got=str(path))
    if is_container(path):
        from qkit.flows.coded import verify_coded

        if runtime_cache:
            raise _no_cache(path)
        return verify_coded(path, model=model, source=source, trust_pickle=trust_pickle)
    artifact = read_artifact(path)
    if runtime_cache and artifact.target in LOWERED:
        raise _no_cache(path)
    if artifact.target in (COMPRESSED, QUANTO):
        raise RequestError(
            f"a {artifact.target} folder carries no outputs to verify it with",
            where=str(path),
            fix="it was verified when it was written; qkit.load reads it",
        )
    check_files(artifact)
    if artifact.target in LOWERED:
        from qkit.flows.runtime import verify_lowered

        return verify_lowered(artifact, artifact.target, trusted=trust_code)
    _ = artifact.layers, artifact.aliases, artifact.buffers  # also what no way below reads
    reference = expected(artifact)
    ways = _ways(artifact, reference, bool(model or source))
    job = verify_job(artifact, ways, model, source, trust_pickle) | {"runtime_cache": runtime_cache}
    outputs, facts = fresh_process(job, artifact)
    runtime = f"torch {torch.__version__}, eager"
    return verification(ways, reference, outputs, artifact, runtime) | facts


def _no_cache(path: str | Path) -> UsageError:
    return UsageError("the runtime cache is that of --target torch", where=str(path))


def verify_runtime(
    artifact: Artifact,
    way: str,
    package: str,
    *,
    model: str | None = None,
    source: str | Path | None = None,
    trust_pickle: bool = False,
    slack: float = 0.0,
) -> dict[str, Any]:
    """Load a folder for another runtime with it in a fresh process, and compare what it computes.

    ``way`` is ``transformers`` or ``quanto`` (:mod:`qkit.flows.worker`), ``package`` the runtime's
    distribution. Takes the architecture, returns and raises as :func:`verify` does; outputs may
    differ by ``slack`` where that is more than :data:`BOUNDS`.
    """
    job = verify_job(artifact, [way], model, source, trust_pickle)
    outputs, facts = fresh_process(job, artifact)
    runtime = f"{package} {package_version(package)}, torch {torch.__version__}"
    return verification([way], expected(artifact), outputs, artifact, runtime, slack=slack) | facts


def verify_job(
    artifact: Artifact,
    ways: list[str],
    model: str | None,
    source: str | Path | None,
    trust_pickle: bool,
) -> dict[str, Any]:
    """What a fresh process is told (:mod:`qkit.flows.worker`)."""
    return {
        "artifact": str(artifact.path.absolute()),
        "ways": ways,
        "model": model,
        "source": source and str(Path(source).absolute()),
        "trust_pickle": trust_pickle,
        "threads": torch.get_num_threads(),
    }


def verification(
    ways: list[str],
    reference: dict[str, Tensor],
    outputs: dict[str, Tensor],
    artifact: Artifact,
    runtime: str,
    more: Sequence[dict[str, Any]] = (),
    slack: float = 0.0,
) -> dict[str, Any]:
    """What :func:`verify` returns, if the ``outputs`` of all ``ways`` are as they should be.

    ``more`` are checks that were made already; ``slack`` is as in :func:`verify_runtime`.
    """
    checks = [*more, *(_judge(way, reference, outputs, artifact, slack) for way in ways)]
    return {
        "status": "verified",
        "level": ways[0] if ways == ["layers"] else "model" if ways else more[0]["way"],
        "runtime": runtime,
        "fresh_process": True,
        "bit_identical": all(c["bit_identical"] for c in checks),
        "max_rel_error": max(c["max_rel_error"] for c in checks),
        "checks": checks,
    }


def _ways(artifact: Artifact, reference: dict[str, Tensor], architecture: bool) -> list[str]:
    if not any(key.startswith("module.") for key in reference):
        return ["layers"]
    builder = artifact.builder or {}
    ways = ["module"] if architecture or builder.get("kind") == "transformers" else []
    if PROGRAM in artifact.files:
        ways.append("program")
    if not ways:
        raise UsageError(
            "the artifact does not carry its architecture",
            where=str(artifact.path),
            fix=f"--model {builder.get('factory', 'package.module:factory')}, or --source with the "
            "model file it came from",
        )
    return ways


def fresh_process(
    job: dict[str, Any], artifact: Artifact
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Do ``job`` (:mod:`qkit.flows.worker`) in a new process; return its outputs and facts.

    Raises :class:`~qkit.errors.VerificationError` if the artifact cannot be run there.
    """
    with tempfile.TemporaryDirectory(prefix="qkit-verify-") as folder:
        job_path, out = Path(folder, "job.json"), Path(folder, "out")
        job_path.write_text(json.dumps(job | {"out": str(out)}), encoding="utf-8")
        command = fresh_command("qkit.flows.worker", str(job_path))
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            code, lines = process.returncode, process.stderr.strip().splitlines() or ["no output"]
            if code in _REQUESTS:
                raise _REQUESTS[code](lines[-1])
            raise VerificationError(
                "the artifact could not be run in a fresh process",
                where=str(artifact.path),
                got=f"exit {code}: {lines[-1]}" if code != InputError.exit_code else lines[-1],
            )
        tensors = read_tensors(out.with_suffix(".safetensors"))
        outputs = {name: tensor.clone() for name, tensor in tensors.items()}
        return outputs, json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def _judge(
    way: str,
    reference: dict[str, Tensor],
    outputs: dict[str, Tensor],
    artifact: Artifact,
    slack: float,
) -> dict[str, Any]:
    prefix = "layers." if way == "layers" else "module."
    worst, identical = 0.0, True
    wanted = {k.removeprefix(prefix): t for k, t in reference.items() if k.startswith(prefix)}
    got = {k.removeprefix(f"{way}."): t for k, t in outputs.items() if k.startswith(f"{way}.")}
    if wanted.keys() != got.keys() or not wanted:
        raise VerificationError(
            f"the artifact gives other outputs ({way})",
            where=str(artifact.path),
            got=f"{len(got)} outputs",
            wanted=f"{len(wanted)}",
        )
    for name, want in wanted.items():
        have = got[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise VerificationError(
                f"output {name} has another shape or type ({way})",
                where=str(artifact.path),
                got=f"{have.dtype} {tuple(have.shape)}",
                wanted=f"{want.dtype} {tuple(want.shape)}",
            )
        identical = identical and torch.equal(have, want)
        stats = compare([want], [have])
        error = stats.max_abs / stats.max_ref if stats.max_ref else stats.max_abs
        bound = max(slack, BOUNDS.get(want.dtype, 0.0))
        if not error <= bound:
            raise VerificationError(
                f"the artifact does not reproduce output {name} ({way})",
                where=str(artifact.path),
                got=f"a relative error of {error:.3g}",
                wanted=f"at most {bound:.3g}",
            )
        worst = max(worst, error)
    return {"way": way, "bit_identical": identical, "max_rel_error": worst}
