"""Opening what a command is given: a model file or an artifact, and what it is run on."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import fx, nn

from qkit.errors import UsageError
from qkit.flows.check import inputs_of, is_callable
from qkit.flows.data import gathered
from qkit.models import (
    Inputs,
    Loaded,
    Source,
    as_example,
    infer,
    parse_input_spec,
    resolve_factory,
)
from qkit.models import load as load_model
from qkit.models.exported import modularize
from qkit.models.loaded import facts_of
from qkit.spec import steps_of
from qkit.targets.artifact import META, PROGRAM, Artifact, read_artifact
from qkit.targets.torch import load as load_artifact


def pruned_artifact(path: str | Path) -> Artifact | None:
    """The artifact at ``path``, if its weights are floats as those of a model are: what steps of a
    recipe made (pruned, factorized, distilled, trained)."""
    if not (Path(path) / META).is_file():
        return None
    artifact = read_artifact(path)
    changed = artifact.edits or artifact.factorized or steps_of(artifact.meta.get("recipe"))
    return artifact if changed and not artifact.layers else None


def open_source(path: str | Path, *, factory: str | None, trust_pickle: bool = False) -> Loaded:
    """The model in ``path``: a file or folder that :func:`qkit.models.load` reads, or an artifact.

    A pruned artifact is loaded into the model that ``factory`` builds, or that its configuration
    names; else its program is taken, whose layers are called by the graph. Raises what
    :func:`qkit.models.load` and :func:`qkit.load` raise.
    """
    if (artifact := pruned_artifact(path)) is None:
        return load_model(path, factory=factory, trust_pickle=trust_pickle)
    model = load_artifact(artifact.path, resolve_factory(factory) if factory else None)
    notes = []
    if isinstance(model, fx.GraphModule):
        # A program's graph has one mode, and its module refuses to be asked for another.
        for name in ("train", "eval"):
            vars(model).pop(name, None)
        model = modularize(model)
        notes.append(f"the model is the {PROGRAM} of an artifact (--model gives its class back)")
    builder = {"kind": "factory", "factory": factory} if factory else artifact.builder
    source = Source(str(path), "artifact", facts_of(artifact.weights), tuple(notes))
    example = inputs_of(artifact) if is_callable(artifact) else None
    return Loaded(source, model=model, builder=builder, example_inputs=example)


def module_of(loaded: Loaded, problem: str, options: str = "--model") -> nn.Module:
    """The model of ``loaded``; :class:`~qkit.errors.UsageError` for a bare state dict, which has
    this ``problem``, and for which ``options`` name an architecture."""
    if loaded.model is None:
        raise UsageError(
            f"a bare state dict {problem}",
            where=loaded.source.path,
            fix=f"{options} package.module:factory names the architecture",
        )
    return loaded.model


class Given(Protocol):
    """The options of a command that say what a model is run on."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def input(self) -> str | None: ...  # noqa: D102
    @property
    def calib(self) -> str | None: ...  # noqa: D102
    @property
    def image(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def request_inputs(request: Given, loaded: Loaded) -> Inputs | None:
    """The inputs that the options of a run name, or that are inferred; None if none are known."""
    if request.input and request.calib:
        raise UsageError("give --input or --calib, not both")
    if loaded.model is None:
        if request.input or request.calib:
            module_of(loaded, "cannot be run on inputs")
        return None
    if request.input:
        return parse_input_spec(request.input, seed=request.seed)
    if request.calib:
        found = gathered(request.calib, loaded.model, request.image)
        return as_example(found, loaded.example_inputs, loaded.model)
    if loaded.example_inputs is not None:
        return loaded.example_inputs
    return infer(loaded.model, seed=request.seed)
