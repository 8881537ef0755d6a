"""Opening: modules that compute with raw parameters become modules that call layers.

:data:`OPENED` is the table, with what is known of transformers by name beside it. What computes its
weights anew at every call (weight norm, a pruning mask, a parametrization) is settled first, and a
layer of which nothing more is to be done then counts as opened too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from qkit.nn.attention import OpenAttention
from qkit.nn.bilinear import OpenBilinear
from qkit.nn.computed import computed_by, detached, is_computing, settled
from qkit.nn.experts import OpenExperts, is_experts
from qkit.nn.lookup import OpenLookup, is_subclass
from qkit.nn.opened import Opened, linear, obstacle
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
    nn.Bilinear: OpenBilinear,
}
# transformers' linear layer with a transposed weight, which is not imported for this.
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"


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

    ``module`` is not changed, and the tensors of both are the same, or views. What could be opened
    but for something special says why not (:func:`why_closed`).
    """
    names = computed_by(module)
    if not names and _opener(module) is None:
        return None
    plain = settled(module)
    if _obstacle(plain) is not None:
        return None
    build, kind = _opener(plain), type(plain).__name__
    new = plain if build is None else build[0](plain)
    new.opened_from = kind  # type: ignore[assignment]
    what = ", ".join(dict.fromkeys(names.values()))
    return Opening(new, kind, f"{what} folded" if names else None)


def why_closed(module: nn.Module) -> str | None:
    """Why ``module``, of a class that could be opened, stays as it is; None where it does not."""
    return _obstacle(settled(module))


def _opener(module: nn.Module) -> tuple[Callable[[Any], nn.Module], set[str]] | None:
    """What opens a module of this class, and the names of the tensors that it takes over."""
    kind: Any = type(module)
    cls = OPENED.get(kind) or (OpenExperts if is_experts(module) else None)
    if cls is not None:
        return cls, cls.tensors_of(module)
    if is_subclass(module):
        return OpenLookup, OpenLookup.tensors_of(module)
    if f"{kind.__module__}.{kind.__qualname__}" == _TRANSPOSED:
        return _transposed, {"weight", "bias"}
    return None


def _transposed(module: Any) -> nn.Linear:
    return linear(module.weight.T, module.bias).train(module.training)


def _obstacle(plain: nn.Module) -> str | None:
    opener = _opener(plain)
    return None if opener is None else obstacle(plain, opener[1])


def gone(module: nn.Module, form: Opening) -> list[nn.Parameter]:
    """The parameters of ``module`` that ``form`` has views of, or what was computed from them."""
    kept = {id(p) for p in form.module.parameters()}
    return [p for p in module.parameters() if id(p) not in kept]


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
