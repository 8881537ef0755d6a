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
from torch import Tensor, nn

from qkit.errors import InputError, QkitError
from qkit.flows.check import inputs_of, layer_outputs
from qkit.flows.runtime import work
from qkit.flows.source import open_source
from qkit.models import resolve_factory, run
from qkit.models.checkpoint import Checkpoint, open_folder
from qkit.models.factory import offline_transformers, spread, ties_of, transformers_class
from qkit.report import peak_rss_bytes, resident_bytes
from qkit.targets.artifact import WEIGHTS, Artifact, read_artifact
from qkit.targets.coded import DIGEST, digest
from qkit.targets.program import load_program
from qkit.targets.quanto import map_of
from qkit.targets.torch import load
from qkit.targets.weights import read_tensors, read_weights, save_tensors, with_aliases


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
            model = _from_pretrained(artifact)
        elif way == "quanto":
            model = _requantized(artifact, _architecture(job))
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


def _from_pretrained(artifact: Artifact) -> nn.Module:
    """The model as transformers loads it from the folder, without qkit's help."""
    with offline_transformers() as transformers:
        name = (artifact.builder or {}).get("class", "")
        cls = transformers_class(transformers, name, artifact.path)
        model, info = cls.from_pretrained(
            artifact.path, local_files_only=True, output_loading_info=True
        )
    wrong = {key: sorted(map(str, info[key])) for key in info if info[key]}
    if wrong:
        raise InputError("transformers does not load the weights", got=json.dumps(wrong)[:500])
    return model.eval()


def _requantized(artifact: Artifact, architecture: Any) -> nn.Module:
    """The model as optimum-quanto loads it from the folder, without qkit's help."""
    from optimum.quanto import requantize

    builder, path = artifact.builder, map_of(artifact.path)
    assert path is not None
    if builder is not None and builder["kind"] == "transformers":
        with offline_transformers() as transformers:
            cls = transformers_class(transformers, builder["class"], artifact.path)
            config = transformers.AutoConfig.from_pretrained(artifact.path, local_files_only=True)
            model = cls._from_config(config)  # as quanto does: in the dtype that config.json names
    else:
        model = architecture if isinstance(architecture, nn.Module) else architecture()
    assert isinstance(model, nn.Module)
    # Copied, not mapped: see BF16_CRASH in qkit.flows.quanto.
    stored = {name: t.clone() for name, t in read_tensors(artifact.path / WEIGHTS).items()}
    state = spread(stored, ties_of(model))
    requantize(model, dict(state), json.loads(path.read_text(encoding="utf-8")))
    # It loads what it finds and is content.
    if wrong := model.state_dict().keys() ^ state.keys():
        raise InputError("optimum-quanto does not load the weights", got=", ".join(sorted(wrong)))
    if tie := getattr(model, "tie_weights", None):
        tie()
    return model.eval()


def _architecture(job: dict[str, Any]) -> Any:
    if job["model"]:
        return resolve_factory(job["model"])
    if job["source"]:
        return open_source(job["source"], factory=None, trust_pickle=job["trust_pickle"]).model
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
