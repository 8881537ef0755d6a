"""The inputs of a bench: where they come from, and batches of any size of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.flows.bench.plan import MODEL, QKIT, Plan
from qkit.flows.check import inputs_of, is_callable
from qkit.flows.data import Data
from qkit.flows.evaluate import COMPARED_SAMPLES, AnyInputs, as_inputs
from qkit.flows.source import open_source
from qkit.models import Inputs, infer, leading, split
from qkit.targets import LOWERED
from qkit.targets.artifact import is_artifact, read_artifact


def known_inputs(
    given: AnyInputs | Data | None,
    plans: Sequence[Plan],
    batch: int,
    model: str | None,
    trust_pickle: bool,
) -> Inputs:
    """What all contenders are called with: as many samples as are needed, if there are.

    Raises :class:`~qkit.errors.UsageError` if nothing was given and no contender knows any.
    """
    if isinstance(given, Data):
        return given.head(max(batch, COMPARED_SAMPLES))
    found = None if given is None else as_inputs(given)
    for plan in plans:
        found = found or _of(plan, model, trust_pickle)
    if found is None:
        raise UsageError("no inputs are known", fix="--calib or --input with what the models take")
    return found


def _of(plan: Plan, model: str | None, trust_pickle: bool) -> Inputs | None:
    """The inputs that a contender knows, or that can be inferred from it."""
    if plan.kind in (QKIT, *LOWERED) and is_artifact(plan.path):
        artifact = read_artifact(plan.path)
        return inputs_of(artifact) if is_callable(artifact) else None
    if plan.kind == MODEL:
        trusted = trust_pickle or plan.trusted
        loaded = open_source(plan.file, factory=model, trust_pickle=trusted)
        if loaded.example_inputs is not None:
            return loaded.example_inputs
        return None if loaded.model is None else infer(loaded.model)
    return None


def samples(inputs: Inputs, count: int) -> Inputs:
    """``count`` samples: the first ones, again from the first where there are fewer."""
    have = leading(inputs)
    if have == 0 or have >= count:
        return split(inputs, count)

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != have:
            return tensor
        return torch.cat([tensor] * -(-count // have))[:count]

    kwargs = {name: repeated(tensor) for name, tensor in inputs.kwargs.items()}
    return replace(inputs, args=tuple(map(repeated, inputs.args)), kwargs=kwargs)
