"""Coded files: writing a quantized model as one entropy-coded file, and proving what it holds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import VerificationError
from qkit.flows.check import expected, model_check
from qkit.flows.evaluate import AnyInputs, as_inputs, eval_mode, fill_cost, for_dtype
from qkit.flows.save import fill_files, head
from qkit.flows.verify import fresh_process, verification, verify_job
from qkit.models import Source
from qkit.packing.container import MAGIC
from qkit.report import Report
from qkit.targets import CODED
from qkit.targets.artifact import CHECK, Artifact, read_artifact
from qkit.targets.coded import DIGEST, coded_bytes
from qkit.targets.staging import as_output_error, check_file_destination, parents, staged_file
from qkit.targets.weights import describe_weights, save_tensors


def save_coded(
    qmodel: nn.Module,
    path: str | Path,
    *,
    report: Report | None = None,
    inputs: AnyInputs | None = None,
    source: Source | None = None,
    builder: dict[str, Any] | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    start: float | None = None,
) -> Artifact:
    """Write ``qmodel`` to the one file ``path``, entropy coded without loss.

    The file holds every tensor and what ``qkit.load(path, into=...)`` needs to put them into the
    architecture; no program and no check file. It appears once a fresh process has decoded exactly
    the tensors of ``qmodel``, and, where ``source`` or ``builder`` tell the architecture, got its
    outputs on ``inputs``. The arguments are those of :func:`qkit.save`, and so are the errors.
    """
    out = Path(path)
    check_file_destination(out, MAGIC, overwrite=overwrite)
    tensors, facts = describe_weights(qmodel)
    data = coded_bytes(tensors, Artifact(out, head(report, source, builder) | facts))
    check: dict[str, Tensor] | None = None
    if inputs is not None and (source or builder):
        with eval_mode(qmodel):
            check = model_check(qmodel, for_dtype(as_inputs(inputs), qmodel))
    with as_output_error(out), parents(out.absolute()), staged_file(out) as part:
        part.write_bytes(data)
        result = verify_coded(
            part,
            model=(builder or {}).get("factory"),
            source=source.path if source and builder is None else None,
            trust_pickle=trust_pickle,
            check=check,
        )
    if report is not None:
        report.target = CODED
        report.verification = result
        fill_files(report, source, len(data), out)
        if start is not None:
            fill_cost(report, start)
    return read_artifact(out)


def verify_coded(
    path: str | Path,
    *,
    model: str | None = None,
    source: str | Path | None = None,
    trust_pickle: bool = False,
    check: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Decode the coded file ``path`` in a fresh process; the tensors must have the hash it states.

    With an architecture (of ``model`` or ``source``) it is also loaded there, which takes every
    tensor strictly, and, with ``check`` (the tensors of a check file), must give the outputs.
    Returns and raises as :func:`qkit.verify` does.
    """
    artifact = read_artifact(path)
    ways = ["tensors"] + (["module"] if check and (model or source) else [])
    with tempfile.TemporaryDirectory(prefix="qkit-check-") as folder:
        reference: dict[str, Tensor] = {}
        if check:
            save_tensors(check, Path(folder, CHECK))
            reference = expected(Artifact(Path(folder), {}))
        job = verify_job(artifact, ways, model, source, trust_pickle) | {"check": folder}
        outputs, facts = fresh_process(job, artifact)
    stated, found = artifact.meta.get(DIGEST), facts.pop(DIGEST)
    if stated != found:
        raise VerificationError(
            "the coded file does not hold the tensors that were written",
            where=str(artifact.path),
            got=f"sha256 {found[:12]}...",
            wanted=f"{str(stated)[:12]}...",
        )
    exact = [{"way": "tensors", "bit_identical": True, "max_rel_error": 0.0}]
    runtime = f"torch {torch.__version__}, eager"
    return verification(ways[1:], reference, outputs, artifact, runtime, exact) | facts
