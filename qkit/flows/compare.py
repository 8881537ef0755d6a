"""``qkit compare``: how two models differ, at the output and layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.flows.check import inputs_of, is_callable
from qkit.flows.data import Data, in_memory
from qkit.flows.evaluate import COMPARED_SAMPLES, AnyInputs, as_inputs, eval_mode, for_dtype
from qkit.flows.per_layer import GAIN_DB, SAMPLES, ModuleModel, PerLayer, of_artifact
from qkit.flows.per_layer import per_layer as layer_costs
from qkit.models import Inputs, infer, resolve_factory, run, split
from qkit.models import load as load_model
from qkit.nn import QLayer, tree
from qkit.nn.computed import detached
from qkit.nn.open import opened_like
from qkit.report import ErrorStats
from qkit.report import compare as compare_tensors
from qkit.targets import LOWERED
from qkit.targets import torch as torch_target
from qkit.targets.artifact import PROGRAM, Artifact, is_artifact, read_artifact
from qkit.targets.weights import float_tensors


@dataclass(frozen=True)
class LayerDifference:
    """One layer of both models: ``what`` is its output, or its weight where nothing was run."""

    name: str
    kinds: tuple[str, str]
    what: str
    error: ErrorStats


@dataclass(frozen=True)
class Comparison:
    """``output`` is None where the models could not be run; then layers compare weights.

    ``per_layer`` tells what each layer costs, where that was asked for."""

    output: ErrorStats | None
    layers: list[LayerDifference]
    inputs: str | None
    only_in_a: list[str]
    only_in_b: list[str]
    per_layer: PerLayer | None = None

    def to_json(self) -> dict[str, Any]:
        """This comparison as plain data."""
        rows = [
            {"name": d.name, "kinds": list(d.kinds), "what": d.what} | d.error.to_json()
            for d in self.layers
        ]
        return {
            "output": self.output and self.output.to_json(),
            "inputs": self.inputs,
            "layers": rows,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
        } | ({"per_layer": self.per_layer.to_json()} if self.per_layer else {})


@dataclass(frozen=True)
class _Opened:
    """A model that may be callable, and modules with its layers' names and float weights."""

    model: nn.Module | None
    layers: nn.Module
    artifact: Artifact | None = None

    def inputs(self) -> Inputs | None:
        """Inputs that the model takes, if they are known or can be inferred."""
        if self.artifact is not None and is_callable(self.artifact):
            return inputs_of(self.artifact)
        return infer(self.layers)


def _open(
    model: nn.Module | str | Path, factory: str | None, trust_pickle: bool, like: nn.Module | None
) -> _Opened:
    """What is compared. ``like`` may be the architecture of an artifact that does not carry one."""
    if isinstance(model, nn.Module):
        return _Opened(model, model)
    if is_artifact(model):
        return _open_artifact(read_artifact(model), factory, like)
    loaded = load_model(model, factory=factory, trust_pickle=trust_pickle)
    if loaded.model is not None:
        return _Opened(loaded.model, loaded.model)
    return _Opened(None, tree(loaded.state_dict or {}, loaded.layer_kinds))


def _open_artifact(artifact: Artifact, factory: str | None, like: nn.Module | None) -> _Opened:
    if factory or (artifact.builder or {}).get("kind") == "transformers":
        into = resolve_factory(factory) if factory else None
        loaded = torch_target.load(artifact.path, into)
        return _Opened(loaded, loaded, artifact)
    if like is not None:
        # Another architecture does not fit; one that cannot be copied is no help either.
        with suppress(Exception):
            loaded = torch_target.load(artifact.path, copy.deepcopy(like, detached(like)))
            return _Opened(loaded, loaded, artifact)
    program = torch_target.load(artifact.path) if PROGRAM in artifact.files else None
    return _Opened(program, tree(float_tensors(artifact)), artifact)


def compare(
    a: nn.Module | str | Path,
    b: nn.Module | str | Path,
    inputs: AnyInputs | Data | None = None,
    *,
    model: str | None = None,
    trust_pickle: bool = False,
    per_layer: bool = False,
    gain: float = GAIN_DB,
) -> Comparison:
    """The error of ``b`` against ``a``: of the outputs, and of each layer that both have.

    Each is a module, a model file or an artifact; an artifact without its architecture takes that
    of the other one, if that is a float model, or ``model``'s (``package.module:factory``). Both
    run on the same ``inputs`` (if none are given, those that an artifact was checked with, or
    inferred ones); a layer's error includes
    what it inherits from the layers before it. Where layers cannot be run, weights are compared
    instead.

    With ``per_layer``, ``a`` is the float model and ``b`` quantized, or an artifact of the PT2E
    flow, for which ``inputs`` are its calibration data: each layer is also quantized alone, and the
    layers are named that gain ``gain`` decibels when they stay in float (:class:`PerLayer`).
    """
    if per_layer and not isinstance(b, nn.Module) and is_artifact(b):
        artifact = read_artifact(b)
        if artifact.target in LOWERED:
            return _lowered(_open(a, model, trust_pickle, None), artifact, inputs, gain)
    if isinstance(inputs, Data):
        inputs = inputs.head(COMPARED_SAMPLES)
    if isinstance(b, nn.Module) or not is_artifact(b):
        second = _open(b, model, trust_pickle, None)
        first = _open(a, model, trust_pickle, second.model)
    else:
        first = _open(a, model, trust_pickle, None)
        second = _open(b, model, trust_pickle, None if first.artifact else first.model)
    first, second = _alike(first, second), _alike(second, first)
    names = [{n for n, m in x.layers.named_modules() if _owns(m)} for x in (first, second)]
    only = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    given: Inputs | None = None
    if first.model is not None and second.model is not None:
        given = first.inputs() or second.inputs() if inputs is None else as_inputs(inputs)
    elif inputs is not None:
        raise UsageError(
            "one of the models cannot be run on inputs: it is tensors without an architecture",
            fix="--model package.module:factory names the architecture",
        )
    if given is None or first.model is None or second.model is None:
        if per_layer:
            raise UsageError(
                "layers can be judged only where both models run",
                fix="--calib or --input; --model package.module:factory names an architecture",
            )
        return Comparison(None, _weights(first.layers, second.layers, needed=True), None, *only)
    with eval_mode(first.model, second.model):
        with _captured(first.model) as outputs_a:
            reference = run(first.model, for_dtype(given, first.model))
        with _captured(second.model) as outputs_b:
            result = run(second.model, for_dtype(given, second.model))
    layers = [
        LayerDifference(name, _kinds(first.layers, second.layers, name), "output", stats)
        for name, x in outputs_a.items()
        if (y := outputs_b.get(name)) is not None and x.shape == y.shape
        for stats in [compare_tensors([x], [y])]
    ]
    layers = layers or _weights(first.layers, second.layers, needed=False)
    costs = None
    if per_layer:
        part = split(given, SAMPLES)
        costs = layer_costs(ModuleModel(first.model, second.model, part), given.origin, gain=gain)
    return Comparison(compare_tensors(reference, result), layers, given.origin, *only, costs)


def _lowered(
    first: _Opened, artifact: Artifact, inputs: AnyInputs | Data | None, gain: float
) -> Comparison:
    """The layers of a float model and of an artifact that another runtime runs."""
    if first.model is None:
        raise UsageError(
            "the float model cannot be run: it is tensors without an architecture",
            fix="--model package.module:factory names the architecture",
        )
    given = inputs_of(artifact) if inputs is None else inputs
    data = given if isinstance(given, Data) else in_memory(given)
    costs = of_artifact(first.model, artifact, data, gain=gain)
    return Comparison(costs.output, [], costs.inputs, [], [], costs)


def _alike(one: _Opened, other: _Opened) -> _Opened:
    """``one`` with the modules opened that are opened in ``other``."""
    try:
        layers = opened_like(one.layers, other.layers)
    except Exception:  # a model that cannot be copied: its modules are named as only in one
        return one
    model = layers if one.model is one.layers else one.model
    return replace(one, layers=layers, model=model)


def _owns(module: nn.Module) -> bool:
    return bool(module._parameters) or isinstance(module, QLayer)


def _kinds(a: nn.Module, b: nn.Module, name: str) -> tuple[str, str]:
    return type(a.get_submodule(name)).__name__, type(b.get_submodule(name)).__name__


@contextmanager
def _captured(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The last output of every layer with parameters that gives one float tensor, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                outputs[name] = output.detach()

        return hook

    layers = [(n, m) for n, m in model.named_modules() if n and _owns(m)]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _weights(a: nn.Module, b: nn.Module, *, needed: bool) -> list[LayerDifference]:
    rows = []
    for name, module in a.named_modules():
        try:
            other = b.get_submodule(name)
        except AttributeError:
            continue
        x, y = getattr(module, "weight", None), getattr(other, "weight", None)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            with torch.no_grad():
                stats = compare_tensors([x], [y])
            rows.append(LayerDifference(name, _kinds(a, b, name), "weight", stats))
    if needed and not rows:
        raise InputError(
            "the models have no layer in common", fix="compare a model with its own copy"
        )
    return rows
