"""Cutting: tensors shrink in place, attributes follow, and what was done is recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.pruning.facts import Count, Facts, Slot, left
from qkit.pruning.groups import Removed
from qkit.spec.plain import show, take

# Where a model remembers what was cut from it.
EDITS = "structural_edits"
MAX_SIZE = 1 << 40


class Skipped(nn.Module):
    """What stands in the place of a block that is gone: it gives back the first thing it takes, in
    a tuple if the block did. Plain attributes, which a model may ask its blocks for, stay."""

    def __init__(self, block: nn.Module, alone: bool) -> None:
        super().__init__()
        plain = (bool, int, float, str)
        for name, value in vars(block).items():
            if not name.startswith("_") and isinstance(value, plain):
                setattr(self, name, value)
        self.alone = alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        given = args[0] if args else next(iter(kwargs.values()))
        return (given,) if self.alone else given


@dataclass(frozen=True)
class Edits:
    """How a model differs from what its class builds: ``shapes`` of tensors by name, ``attributes``
    by the name of their module, and blocks that are ``skipped``, with what :class:`Skipped` has to
    know of each."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int | tuple[int, ...]]] = field(default_factory=dict)
    skipped: dict[str, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.skipped)

    def to_json(self) -> dict[str, Any]:
        """These edits as plain data."""
        attributes = {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            for name, values in self.attributes.items()
        }
        data = {"shapes": {n: list(s) for n, s in self.shapes.items()}, "attributes": attributes}
        return data | ({"skipped": dict(self.skipped)} if self.skipped else {})

    @staticmethod
    def from_json(data: object) -> Edits:
        """The edits that :meth:`to_json` described, else :class:`~qkit.errors.InputError`."""
        kinds = {"shapes": dict, "attributes": dict}
        if isinstance(data, dict) and "skipped" in data:
            kinds["skipped"] = dict
        shapes, attributes, *more = take(data, "structural edits", kinds)
        skipped = more[0] if more else {}
        if not all(type(alone) is bool for alone in skipped.values()):
            raise InputError("not the blocks that are skipped", got=show(skipped))
        for values in attributes.values():
            if not isinstance(values, dict):
                raise InputError("not the attributes of a module", got=show(values))
        return Edits(
            {name: _sizes(shape) for name, shape in shapes.items()},
            {
                name: {
                    k: _sizes(v) if isinstance(v, list) else _sizes([v])[0] for k, v in own.items()
                }
                for name, own in attributes.items()
            },
            dict(skipped),
        )

    def without(self, modules: Iterable[str]) -> Edits:
        """These edits but for what lies in ``modules``, which others have replaced."""
        gone = tuple(f"{name}." for name in modules)
        return Edits(
            {name: shape for name, shape in self.shapes.items() if not name.startswith(gone)},
            {n: own for n, own in self.attributes.items() if not f"{n}.".startswith(gone)},
            self.skipped,
        )

    def then(self, later: Edits) -> Edits:
        """These edits and ``later`` ones, as one."""
        names = [*self.attributes, *(n for n in later.attributes if n not in self.attributes)]
        attributes = {n: self.attributes.get(n, {}) | later.attributes.get(n, {}) for n in names}
        both = Edits(self.shapes | later.shapes, attributes)
        lost = both.without(later.skipped)
        return Edits(lost.shapes, lost.attributes, self.skipped | later.skipped)


def _sizes(data: object) -> tuple[int, ...]:
    if not isinstance(data, list) or not all(type(n) is int and 0 < n < MAX_SIZE for n in data):
        raise InputError("not a shape", got=show(data))
    return tuple(data)


def _counts(data: object) -> int | tuple[int, ...]:
    return _sizes(data) if isinstance(data, list) else _sizes([data])[0]


def edits_of(model: nn.Module) -> Edits:
    """What was cut from ``model`` so far."""
    found = vars(model).get(EDITS)
    return found if isinstance(found, Edits) else Edits()


def twin(model: nn.Module, facts: Facts) -> nn.Module:
    """A copy of ``model`` that shares its tensors, to be :func:`cut`."""
    memo: dict[int, Any] = {id(slot.tensor): slot.tensor for slot in facts.slots.values()}
    return copy.deepcopy(model, memo)


def cut(
    model: nn.Module,
    facts: Facts,
    removed: Removed,
    counts: list[Count],
    *,
    shared: bool = False,
) -> Edits:
    """Remove the labels ``removed`` from the tensors of ``model`` and set its ``counts``.

    ``shared`` says that the tensors are those of another model, which must keep them: then those
    of which nothing goes are copied. Returns the edits, and adds them to those of the model.
    """
    shapes = {}
    for slot in facts.slots.values():
        new = _shrunk(slot, removed, shared=shared)
        if new is slot.tensor:
            continue
        for name in slot.names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
            if new.shape != slot.tensor.shape:
                shapes[name] = tuple(new.shape)
    attributes: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for count in counts:
        module = model.get_submodule(count.module)
        old, new_count = getattr(module, count.attribute), left(count.ids, removed, count.dim)
        value: int | tuple[int, ...] = new_count
        if count.index is not None:
            value = (*old[: count.index], new_count, *old[count.index + 1 :])
        if value != old:
            setattr(module, count.attribute, value)
            attributes.setdefault(count.module, {})[count.attribute] = value
    edits = Edits(shapes, attributes)
    vars(model)[EDITS] = edits_of(model).then(edits)
    return edits


def _shrunk(slot: Slot, removed: Removed, *, shared: bool) -> Tensor:
    """The tensor of ``slot`` without what is removed; itself if that is nothing."""
    tensor = slot.tensor.detach()
    for axis, ids in enumerate(slot.axes):
        if (gone := removed[ids]).any():
            tensor = tensor.index_select(
                axis, torch.from_numpy((~gone).nonzero()[0]).to(tensor.device)
            )
    if tensor.shape == slot.tensor.shape:
        if not shared:
            return slot.tensor
        tensor = tensor.clone()
    if isinstance(slot.tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
    return tensor


def reshape(model: nn.Module, edits: Edits) -> nn.Module:
    """Give ``model``, as its class builds it, the shapes and attributes of ``edits``, in place.

    The values of the tensors are not kept; they are empty, on the device where they were. Raises
    :class:`KeyError` with the name of a module, tensor or attribute that the model does not have.
    """
    for name, alone in edits.skipped.items():
        if not isinstance(block := _module(model, name), Skipped):
            model.set_submodule(name, Skipped(block, alone))
    made: dict[int, Tensor] = {}
    for name, shape in edits.shapes.items():
        owner, _, leaf = name.rpartition(".")
        module = _module(model, owner)
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is None or old.dim() != len(shape):
            raise KeyError(name)
        if id(old) not in made:  # one tensor at several places stays one
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new
        setattr(module, leaf, made[id(old)])
    for name, values in edits.attributes.items():
        module = _module(model, name)
        for attribute, value in values.items():
            old_value = vars(module).get(attribute)
            if not _countable(old_value) or isinstance(old_value, int) != isinstance(value, int):
                raise KeyError(f"{name}.{attribute}" if name else attribute)
            setattr(module, attribute, value)
    vars(model)[EDITS] = edits_of(model).then(edits)
    return model


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise KeyError(name) from None


def _countable(value: object) -> bool:
    """Whether an attribute is a count, or some: only such are ever set."""
    if isinstance(value, tuple):
        return all(type(each) is int for each in value)
    return type(value) is int


def zeroed(facts: Facts, removed: Removed) -> Mapping[int, Tensor]:
    """Copies of the parameters, by identity, with zeros where they are ``removed``."""
    found = {}
    for key, slot in facts.slots.items():
        if isinstance(slot.tensor, nn.Parameter) and any(removed[ids].any() for ids in slot.axes):
            tensor = slot.tensor.detach().clone()
            for axis, ids in enumerate(slot.axes):
                gone = torch.from_numpy(removed[ids].nonzero()[0]).to(tensor.device)
                tensor.index_fill_(axis, gone, 0)
            found[key] = tensor
    return found
