"""How much each unit matters, from its weights, its gradients or what comes out of its layer.

The score of a unit is the mean over the weights that it is part of (its own rows, and the columns
that read it). Scores of ``l1`` and ``l2`` are relative to the mean of their group, so that layers
of other fan-in compare; those from gradients and activations are what they are.

``l1``, ``l2``   sum of ``|w|``, and root of the sum of ``w^2``, over the unit's slice
``bn``           ``|gamma|`` of the batch normalisation behind it (Liu et al. 2017)
``taylor``       ``|sum w dL/dw|``: the first-order change of the loss if the slice were zero
                 (Molchanov et al. 2019, with the sum before the magnitude)
``activation``   mean ``|output|`` of the layers whose rows it is
``random``       a draw from the seed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkit.errors import InputError, UsageError, nearest, users_code
from qkit.models import Inputs, run
from qkit.pruning.facts import Facts, Slot
from qkit.pruning.groups import Group

Scores = npt.NDArray[np.float64]
Loss = Callable[[nn.Module], Tensor]

IMPORTANCES = ("l1", "l2", "bn", "taylor", "activation", "random")


def check_importance(name: str) -> None:
    """Raise :class:`~qkit.errors.UsageError` for an unknown importance."""
    if name not in IMPORTANCES:
        raise UsageError("unknown importance", got=repr(name), wanted=nearest(name, IMPORTANCES, 6))


def scores(
    name: str,
    facts: Facts,
    groups: list[Group],
    model: nn.Module,
    *,
    inputs: Inputs,
    loss: Loss | None = None,
    seed: int = 0,
) -> Scores:
    """The importance ``name`` by label; infinite for what a group has no measure for.

    ``loss(model)`` is needed for ``taylor``; ``activation`` runs ``inputs``.
    """
    check_importance(name)
    found = np.full(facts.labels.count, np.inf)
    if name == "random":
        draws = np.random.default_rng(seed)
        for group in groups:
            found[group.units] = draws.random(len(group.units))
        return found
    if name == "taylor":
        if loss is None:
            raise UsageError("the importance 'taylor' needs a loss", fix="loss=function of a model")
        vectors = _gradients(model, facts, loss)
    elif name == "activation":
        vectors = _activations(model, facts, inputs)
    elif name == "bn":
        vectors = _scales(model, facts)
    else:
        vectors = {}
    for group in groups:
        rows = [
            _by_unit(values, slot.axes[axis], group)
            for slot, axis in group.entries
            if (values := _vector(name, slot, axis, vectors)) is not None
        ]
        if rows:
            relative = [row / max(row.mean(), 1e-30) for row in rows] if name in "l1l2" else rows
            found[group.units] = np.mean(relative, axis=0)
    return found


def _vector(
    name: str, slot: Slot, axis: int, vectors: Mapping[tuple[int, int], Tensor]
) -> Tensor | None:
    """The measure of each coordinate along ``axis``; None where this tensor has none."""
    if name not in ("l1", "l2"):
        return vectors.get((id(slot.tensor), axis))
    if not _is_weight(slot.tensor):
        return None
    others = [dim for dim in range(slot.tensor.dim()) if dim != axis]
    weight = slot.tensor.detach().float()
    return weight.abs().sum(others) if name == "l1" else weight.square().sum(others)


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dim() > 1


def _by_unit(values: Tensor, ids: npt.NDArray[np.int64], group: Group) -> Scores:
    weights, count = values.double().cpu().numpy(), int(group.units.max()) + 1
    sums = np.bincount(ids, weights, minlength=count).astype(np.float64)
    return sums[group.units]


def _gradients(model: nn.Module, facts: Facts, loss: Loss) -> dict[tuple[int, int], Tensor]:
    weights = (slot for slot in facts.slots.values() if _is_weight(slot.tensor))
    slots = [slot for slot in weights if slot.tensor.is_floating_point()]
    wanted = [slot.tensor.requires_grad for slot in slots]
    try:
        for slot in slots:
            slot.tensor.requires_grad_(True)
        with torch.enable_grad():
            value = _value(loss, model)
            grads = torch.autograd.grad(value, [s.tensor for s in slots], allow_unused=True)
    finally:
        for slot, want in zip(slots, wanted, strict=True):
            slot.tensor.requires_grad_(want)
    found = {}
    for slot, grad in zip(slots, grads, strict=True):
        if grad is not None:
            product = (slot.tensor.detach() * grad).float()
            for axis in range(product.dim()):
                others = [dim for dim in range(product.dim()) if dim != axis]
                found[id(slot.tensor), axis] = product.sum(others).abs()
    return found


def _value(loss: Loss, model: nn.Module) -> Tensor:
    """The loss; :class:`~qkit.errors.InputError` for one that fails, or is no loss of the model."""
    with users_code("the loss"):
        return one_number(loss(model))


def one_number(value: Tensor) -> Tensor:
    """``value`` as a loss; :class:`~qkit.errors.InputError` where it is none."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError("the loss of a model is one number that depends on it", got=shown)
    return value.reshape(())


def _scales(model: nn.Module, facts: Facts) -> dict[tuple[int, int], Tensor]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
    return {(id(m.weight), 0): m.weight.detach().abs().float() for m in norms}


def _activations(model: nn.Module, facts: Facts, inputs: Inputs) -> dict[tuple[int, int], Tensor]:
    found: dict[tuple[int, int], Tensor] = {}
    with _recorded(model, found):
        run(model, inputs)
    return found


@contextmanager
def _recorded(model: nn.Module, found: dict[tuple[int, int], Tensor]) -> Iterator[None]:
    """Sum up what comes out of each layer by the row of its weight."""

    def record(module: Any, args: object, output: object) -> None:
        weight = module.weight
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
        axis = 1 if turned or type(module).__name__ == "Conv1D" else 0
        if not isinstance(output, Tensor) or weight.dim() < 2:
            return
        convolves = isinstance(module, nn.modules.conv._ConvNd)
        channel = output.dim() - weight.dim() + 1 if convolves else output.dim() - 1
        if output.shape[channel] != weight.shape[axis]:
            return
        others = [dim for dim in range(output.dim()) if dim != channel]
        values = output.detach().abs().float().mean(others)
        found[id(weight), axis] = found.get((id(weight), axis), 0) + values

    layers = [m for m in model.modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
