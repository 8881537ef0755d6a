"""Opening: modules that compute with raw parameters become modules that call layers.

:data:`OPENED` is the table. What computes its weights anew at every call (weight norm, a pruning
mask, a parametrization) is settled first, and a layer of which nothing more is to be done then
counts as opened too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from qkit.nn.attention import OpenAttention
from qkit.nn.computed import computed_by, detached, is_computing, settled
from qkit.nn.opened import Opened, obstacle
from qkit.nn.recurrent import OpenCell, OpenRecurrent
from qkit.nn.swap import swap

OPENED: dict[type[nn.Module], type[Opened]] = {
    nn.LSTM: OpenRecurrent,
    nn.GRU: OpenRecurrent,
    nn.RNN: OpenRecurrent,
    nn.LSTMCell: OpenCell,
    nn.GRUCell: OpenCell,
    nn.RNNCell: OpenCell,
    nn.MultiheadAttention: OpenAttention,
}


@dataclass(frozen=True, eq=False)
class Opening:
    """What a module becomes: ``module``, of a module that was of class ``kind``.

    ``note`` says what was computed and is folded into the weights.
    """

    module: nn.Module
    kind: str
    note: str | None


def opening(module: nn.Module) -> Opening | None:
    """What ``module`` becomes when it is opened; None where there is nothing to open.

    ``module`` is not changed, and the tensors of both are the same. Raises nothing: what cannot be
    opened says why (:func:`why_closed`).
    """
    names = computed_by(module)
    if not (names or type(module) in OPENED):
        return None
    plain = settled(module)
    kind = type(plain)
    if _obstacle(plain) is not None:
        return None
    new = OPENED[kind](plain) if kind in OPENED else plain
    new.opened_from = kind.__name__  # type: ignore[assignment]
    what = ", ".join(dict.fromkeys(names.values()))
    return Opening(new, kind.__name__, f"{what} folded" if names else None)


def why_closed(module: nn.Module) -> str | None:
    """Why ``module``, of a class that could be opened, stays as it is; None where it does not."""
    return _obstacle(settled(module))


def _obstacle(plain: nn.Module) -> str | None:
    cls = OPENED.get(type(plain))
    return None if cls is None else obstacle(plain, cls.tensors_of(plain))


def opened_like(model: nn.Module, other: nn.Module) -> nn.Module:
    """``model``, or a copy that shares its tensors, with what is opened in ``other`` opened too."""
    modules = dict(model.named_modules())
    names = []
    for name, there in other.named_modules():
        kind, here = vars(there).get("opened_from"), modules.get(name)
        form = opening(here) if kind and here is not None else None
        if form is not None and form.kind == kind:
            names.append(name)
    if not names:
        return model
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]} | detached(model)
    return open_modules(copy.deepcopy(model, memo), names)


def open_modules(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Open the modules ``names`` of ``model`` in place; return the model.

    One module at several paths becomes one module. Raises :class:`KeyError` with the name of a
    module that cannot be opened.
    """
    made: dict[int, Any] = {}
    new: dict[str, nn.Module] = {}
    for name in names:
        old = model.get_submodule(name)
        if id(old) not in made:
            if (form := opening(old)) is None:
                raise KeyError(name)
            made[id(old)] = form.module
        new[name] = made[id(old)]
    model = swap(model, new)
    for module in new.values():  # the hooks moved along, with those that computed the weights
        for key, hook in list(module._forward_pre_hooks.items()):
            if is_computing(hook):
                del module._forward_pre_hooks[key]
    return model
