"""A contender as it is called: opened by the runtime that would serve it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from qkit import ops
from qkit.errors import UsageError
from qkit.flows.bench.calling import Signature
from qkit.flows.bench.plan import CODED, QKIT
from qkit.flows.check import inputs_of, is_callable
from qkit.flows.evaluate import for_dtype
from qkit.flows.foreign import class_named, from_pretrained, requantized
from qkit.flows.source import module_of, open_source
from qkit.models import Inputs, resolve_factory, run
from qkit.report import package_version
from qkit.targets import COMPRESSED, LOWERED, QUANTO, TARGETS, require_packages
from qkit.targets.artifact import PROGRAM, Artifact, is_artifact, read_artifact
from qkit.targets.backend import backend
from qkit.targets.torch import load as load_artifact


@dataclass(frozen=True)
class Opened:
    """``call`` runs it on inputs that were made ``fit``; ``kernels`` tells what runs then."""

    runtime: str
    call: Callable[[Inputs], list[Tensor]]
    fit: Callable[[Inputs], Inputs]
    kernels: Callable[[Inputs], Mapping[str, int]]


def opened(job: Mapping[str, Any]) -> Opened:
    """The contender of a job (:mod:`qkit.flows.bench.worker`); raises what its loader raises."""
    kind, file = job["kind"], Path(job["file"])
    if kind in LOWERED:
        return _in_runtime(kind, file, job["threads"])
    names, example = ["torch"], None
    if kind == COMPRESSED:
        names = ["transformers", COMPRESSED]
        require_packages(names, COMPRESSED, "a compressed-tensors folder")
        model = from_pretrained(file, _class_of(file) or "")
    elif kind == QUANTO:
        names = ["optimum-quanto"]
        require_packages(names, QUANTO, "a folder of optimum-quanto")
        model = requantized(file, _class_of(file), _architecture(job, str(file)))
    elif kind in (QKIT, CODED):
        artifact, cached = read_artifact(file), job["runtime_cache"]
        model = load_artifact(file, _into(job, artifact), runtime_cache=cached)
        example = inputs_of(artifact) if is_callable(artifact) else None
    else:
        trusted = job["trust_pickle"] or job["trusted"]
        loaded = open_source(file, factory=job["model"], trust_pickle=trusted)
        model, example = module_of(loaded, "cannot be run"), loaded.example_inputs
    told = ", ".join(f"{name} {package_version(name)}" for name in names)
    return Opened(
        f"{told}, eager" if names == ["torch"] else told,
        lambda inputs: run(model, inputs),
        lambda inputs: for_dtype(_arranged(model, example, inputs), model),
        lambda inputs: _counted(model, inputs),
    )


def _arranged(model: nn.Module, example: Inputs | None, inputs: Inputs) -> Inputs:
    """``inputs`` as a program takes them; a module of a class takes them either way."""
    if example is None or not isinstance(model, fx.GraphModule):
        return inputs
    names = [node.name for node in model.graph.nodes if node.op == "placeholder"]
    return Signature.of(example, names).fit(inputs)


def _counted(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    with ops.count_calls() as calls:
        run(model, inputs)
    return dict(sorted(calls.items()))


def _in_runtime(kind: str, file: Path, threads: int) -> Opened:
    runtime = backend(kind)
    runtime.check(None, {})
    session = runtime.load(file, threads)
    fit: Callable[[Inputs], Inputs] = _as_it_is
    if is_artifact(file.parent):
        fit = Signature.of(inputs_of(read_artifact(file.parent))).fit

    def kernels(inputs: Inputs) -> Mapping[str, int]:
        found = importlib.import_module(f"{TARGETS[kind].module}.runtime").audit(file, 0)
        return Counter(found.integer) + Counter(found.floating)

    return Opened(
        runtime.runtime(), lambda inputs: session(inputs.args, inputs.kwargs), fit, kernels
    )


def _as_it_is(inputs: Inputs) -> Inputs:
    return inputs


def _class_of(folder: Path) -> str | None:
    """The class of transformers that a folder is of."""
    builder = (read_artifact(folder).builder or {}) if is_artifact(folder) else {}
    return builder.get("class") or class_named(folder)


def _into(job: Mapping[str, Any], artifact: Artifact) -> Any:
    """What an artifact is loaded into; None where it carries its architecture."""
    carried = PROGRAM in artifact.files or (artifact.builder or {}).get("kind") == "transformers"
    return None if carried and not job["model"] else _architecture(job, str(artifact.path))


def _architecture(job: Mapping[str, Any], where: str) -> Callable[[], nn.Module] | nn.Module:
    """That of ``--model``, or of the first contender that is a float model."""
    if job["model"]:
        return resolve_factory(job["model"])
    if not job["source"]:
        raise UsageError(
            "no architecture is known to load the tensors into",
            where=where,
            fix="--model package.module:factory, or measure the float model too",
        )
    trusted = job["trust_pickle"] or job["source_trusted"]
    loaded = open_source(job["source"], factory=None, trust_pickle=trusted)
    return module_of(loaded, "is no architecture")
