"""``qkit compare --per-layer``: what each quantized layer costs, and which of them to skip.

Layer by layer, on the same inputs: the error of its output with everything quantized (cumulative),
and the error of the model's output with only this layer quantized (isolated). The layers that cost
most alone are then left in float together, as many as the wanted gain takes; the gain is measured,
not added up, because errors saturate and feed each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkit.errors import CoverageError, RequestError, UsageError
from qkit.flows.check import expected, inputs_of
from qkit.flows.data import Data
from qkit.flows.evaluate import eval_mode, for_dtype
from qkit.flows.pt2e import Prepared, convert, prepare, unfolded
from qkit.flows.treat import harmless
from qkit.graph.partial import Partial
from qkit.models import Inputs, flatten, leading, run
from qkit.nn import QLayer
from qkit.report import ErrorStats
from qkit.report import compare as compare_tensors
from qkit.spec import Recipe
from qkit.targets.artifact import Artifact
from qkit.targets.backend import backend

# Samples that the layers are judged on: each layer is one run of the model.
SAMPLES = 16
# A gain that is worth layers in float.
GAIN_DB = 3.0
# A list may hold at most this share of the layers: beyond it, another scheme is the better advice.
MAX_SHARE = 0.25


class Model(Protocol):
    """A quantized model each of whose layers can be float instead."""

    layers: dict[str, str]  # the name and the kind of each

    def run(self, active: Collection[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs of the model, and of each layer, with only the layers ``active`` rounded."""


@dataclass(frozen=True)
class LayerCost:
    """A quantized layer: SQNR of its output with all layers quantized (``cumulative_db``), and of
    the model's output with this one alone (``isolated_db``); None where nothing changes."""

    name: str
    kind: str
    cumulative_db: float | None
    isolated_db: float | None


@dataclass(frozen=True)
class PerLayer:
    """The layers, the worst first; the error of the ``output``; and the layers to ``skip``, with
    which its SQNR is ``skip_db``. An empty list: none of the allowed length gains a decibel.

    ``reproduced`` tells whether a program that was made again from an artifact's recipe gives what
    the artifact was verified with; None where nothing was made again.
    """

    layers: list[LayerCost]
    output: ErrorStats
    skip: list[str]
    skip_db: float | None
    inputs: str
    reproduced: bool | None = None

    @property
    def gain_db(self) -> float:
        """What skipping gains."""
        return _level(self.skip_db) - _level(self.output.sqnr_db) if self.skip else 0.0

    def to_json(self) -> dict[str, Any]:
        """This as plain data."""
        found = asdict(self) | {"output": self.output.to_json(), "gain_db": self.gain_db}
        return _finite(found) | {"layers": [_finite(asdict(row)) for row in self.layers]}


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in data.items()}


def _level(sqnr_db: float | None) -> float:
    return math.inf if sqnr_db is None else sqnr_db


def per_layer(
    model: Model, origin: str, *, gain: float = GAIN_DB, goal: float | None = None
) -> PerLayer:
    """What each layer of ``model`` costs, and which to leave to win ``gain`` decibels, or to have
    ``goal`` decibels."""
    names = list(model.layers)
    reference, exact = model.run(())

    def error(active: Collection[str]) -> float | None:
        return compare_tensors(reference, model.run(active)[0]).sqnr_db

    outputs, rounded = model.run(names)
    output = compare_tensors(reference, outputs)
    rows = [
        LayerCost(
            name,
            kind,
            compare_tensors([exact[name]], [rounded[name]]).sqnr_db if name in rounded else None,
            error([name]),
        )
        for name, kind in model.layers.items()
    ]
    rows.sort(key=lambda row: _level(row.isolated_db))
    goal = _level(output.sqnr_db) + gain if goal is None else goal
    skip, skip_db = _to_skip(rows, output.sqnr_db, goal, error)
    return PerLayer(rows, output, skip, skip_db, origin)


def _to_skip(
    rows: list[LayerCost],
    total: float | None,
    goal: float,
    error: Callable[[Collection[str]], float | None],
) -> tuple[list[str], float | None]:
    """The shortest list of the worst layers that reaches ``goal``, or the best with whole dBs."""
    best: tuple[list[str], float | None] = ([], total)
    if _level(total) >= goal:
        return best
    names = [row.name for row in rows]
    for count in _counts(int(len(names) * MAX_SHARE)):
        skip = names[:count]
        found = error([name for name in names if name not in skip])
        won = _level(found) - _level(best[1])
        if won >= 1.0:
            best = skip, found
        if _level(found) >= goal:
            return skip, found
    return best


def _counts(limit: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to ``limit``, and that itself."""
    count = 1
    while count < limit:
        yield count
        count += 1 << max(0, count.bit_length() - 2)
    if limit:
        yield limit


class GraphModel:
    """A program of the PT2E flow; its layers are named by the owners of their weights."""

    def __init__(self, prepared: Prepared, inputs: Inputs) -> None:
        chosen = {site.owner: site for site in prepared.sites if site.scheme is not None}
        lstm = [name for name, site in chosen.items() if site.kind == "LSTM"]
        if not (chosen.keys() - lstm):
            raise CoverageError("no layer of the program can be judged alone", got=", ".join(lstm))
        self.layers = {name: chosen[name].kind for name in chosen if name not in lstm}
        nodes = {name: chosen[name].node.name for name in self.layers}
        self.inputs, self.partial = inputs, Partial(unfolded(prepared), nodes)

    def run(self, active: Collection[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """See :class:`Model`."""
        with torch.no_grad():
            outputs = self.partial.forward(active, self.inputs.args, self.inputs.kwargs)
        return list(flatten(outputs)), self.partial.outputs


class ModuleModel:
    """A module of qkit's layers, beside the float one, in whose places they are put by hooks."""

    def __init__(self, model: nn.Module, quantized: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, for_dtype(inputs, model)
        found = {n: m for n, m in quantized.named_modules() if isinstance(m, QLayer)}
        floats = dict(model.named_modules())
        self.quantized = {name: module for name, module in found.items() if name in floats}
        if not self.quantized:
            raise UsageError(
                "the models have no quantized layer in common, so none can be judged alone",
                fix="give the float model first and the quantized one second",
            )
        self.layers = {name: type(floats[name]).__name__ for name in self.quantized}

    def run(self, active: Collection[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """See :class:`Model`."""
        outputs: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if name in active:
                    output = self.quantized[name](*args, **kwargs)
                outputs[name] = output.detach()
                return output

            return replace

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(eval_mode(self.model, *self.quantized.values()))
            for name in self.quantized:
                module = self.model.get_submodule(name)
                handle = module.register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            return run(self.model, self.inputs), outputs


def of_artifact(
    model: nn.Module, artifact: Artifact, data: Data, *, gain: float = GAIN_DB
) -> PerLayer:
    """:func:`per_layer` of an artifact of the PT2E flow, made from ``model`` and ``data``.

    The runtime's file holds no layers that could be switched, so the program is made again, from
    the recipe in the artifact. With the data that it was calibrated with, it is the same program,
    and layers are judged with the weights and biases that they had before any were fitted.
    """
    meta = artifact.meta
    asked = Recipe.from_json(meta.get("recipe"))
    recipe = harmless(asked)
    if all(rule.scheme is None or rule.scheme.weight_only for rule in recipe.rules):
        raise RequestError(
            "layers of weights alone are not judged through a runtime's file",
            where=str(artifact.path),
            fix="qkit quantize with --target torch, and compare that artifact",
        )
    dialect = backend(artifact.target).dialect(meta.get("options") or {})
    observer = meta.get("observer", "minmax")
    prepared = prepare(model, recipe, data, dialect=dialect, observer=observer)
    fixed = prepared.captured.shapes is None
    inputs = data.first() if fixed else data.head(SAMPLES)
    program = GraphModel(prepared, inputs)
    found = per_layer(program, f"{data.origin}, {leading(inputs)} samples", gain=gain)
    again = inputs_of(artifact)
    if recipe == asked:
        program.inputs = again
        outputs, _ = program.run(program.layers)
    else:
        made = convert(model, asked, data, dialect=dialect, observer=observer)
        outputs = run(made.module, again)
    wanted = [t for name, t in expected(artifact).items() if name.startswith("module.")]
    errors = compare_tensors(wanted, outputs)
    return replace(found, reproduced=errors.max_abs <= 1e-5 * errors.max_ref)
