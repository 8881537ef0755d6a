"""The fresh process of a verification: ``python -m qkit.flows.worker JOB.json``.

It knows only what a deployment would know: the artifact, and how to build the architecture. It
loads, runs the stored inputs, and writes what came out; the parent compares. A job has

``artifact``  the folder or coded file
``check``     the folder of the check file, where that is another one
``ways``      what to try: ``module`` (qkit.load), ``program`` (the exported graph),
              ``layers``, ``tensors`` (their hash), ``transformers`` (its own
              from_pretrained), ``quanto`` (requantize)
``model``     package.module:factory or null        ``source``  a model file for the architecture
``runtime_cache``  for ``module``
``trust_pickle``  for ``source``                    ``threads`` as in the parent
``out``       where to write the outputs
``runtime``   instead, a target of the PT2E flow (:func:`qkit.flows.runtime.work`), and ``rival``
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import QkitError
from qkit.flows.check import inputs_of, layer_outputs
from qkit.flows.foreign import from_pretrained, requantized
from qkit.flows.runtime import work
from qkit.flows.source import open_source
from qkit.models import resolve_factory, run
from qkit.models.checkpoint import Checkpoint, open_folder
from qkit.report import peak_rss_bytes, resident_bytes
from qkit.targets.artifact import Artifact, read_artifact
from qkit.targets.coded import DIGEST, digest
from qkit.targets.program import load_program
from qkit.targets.torch import load
from qkit.targets.weights import read_weights, save_tensors, with_aliases


def main(job_path: str) -> int:
    """Do the job and write ``<out>.safetensors`` and ``<out>.json``; return the exit code.

    An error that qkit raises on purpose is one line on standard error and its own exit code.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    try:
        _do(job)
    except QkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _do(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    artifact = read_artifact(job["artifact"])
    if job.get("runtime"):
        work(job, artifact)
        return
    given = Artifact(Path(job["check"]), {}) if job.get("check") else artifact
    outputs: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for way in job["ways"]:
        start, before = time.perf_counter(), resident_bytes()
        if way == "layers":
            # One tensor at a time: the artifact may be larger than memory.
            entries = with_aliases(artifact, open_folder(artifact.path).entries)
            outputs |= layer_outputs(artifact, Checkpoint(entries))
            continue
        if way == "tensors":
            if (into := _architecture(job)) is not None:
                load(artifact.path, into=into)  # strictly
            facts[DIGEST] = digest(read_weights(artifact))
            continue
        if way == "transformers":
            model = from_pretrained(artifact.path, (artifact.builder or {}).get("class", ""))
        elif way == "quanto":
            model = requantized(artifact.path, _class_of(artifact), _architecture(job))
        elif way == "program":
            model = load_program(artifact, read_weights(artifact))
        else:
            model = load(
                artifact.path,
                into=_architecture(job),
                runtime_cache=job.get("runtime_cache", False),
            )
        facts[f"{way}_load_seconds"] = round(time.perf_counter() - start, 3)
        results = run(model, inputs_of(given))
        facts[f"{way}_first_output_seconds"] = round(time.perf_counter() - start, 3)
        grown = {kind: now - before[kind] for kind, now in resident_bytes().items()}
        facts[f"{way}_first_output_bytes"] = grown
        outputs |= {f"{way}.{i}": value for i, value in enumerate(results)}
    facts["peak_rss_bytes"] = peak_rss_bytes()
    out = Path(job["out"])
    save_tensors(outputs, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def _class_of(artifact: Artifact) -> str | None:
    """The class of transformers that the artifact was made of, if it was one."""
    builder = artifact.builder
    return builder["class"] if builder is not None and builder["kind"] == "transformers" else None


def _architecture(job: dict[str, Any]) -> Any:
    if job["model"]:
        return resolve_factory(job["model"])
    if job["source"]:
        return open_source(job["source"], factory=None, trust_pickle=job["trust_pickle"]).model
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
