"""Weights that are computed before every call, settled into plain parameters.

Three mechanisms of torch do that: parametrizations (the module then is of a class that torch
makes), the forward hooks of the older weight norm and spectral norm, and pruning masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# What a parameter's name gets where a mechanism keeps what it computes from.
_LEFTOVERS = ("_g", "_v", "_u", "_orig", "_mask")


def computed_by(module: nn.Module) -> dict[str, str]:
    """The parameters of ``module`` that are computed, and what computes each."""
    found: dict[str, str] = {}
    if is_parametrized(module):
        lists: Any = module.parametrizations
        for name, parts in lists.items():
            kinds = ", ".join(type(part).__name__.strip("_") for part in parts)
            known = {"WeightNorm": "weight norm", "SpectralNorm": "spectral norm"}
            found[name] = known.get(kinds, f"the parametrization {kinds}")
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = "weight norm"
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = "spectral norm"
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = "the pruning mask"
    return found


def detached(model: nn.Module) -> dict[int, Tensor]:
    """A memo for ``copy.deepcopy``, which refuses what was computed with gradients.

    Hooks keep such tensors in attributes and compute them anew at every call.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(v): v.detach() for v in values if isinstance(v, Tensor) and not v.is_leaf}


def is_computing(hook: object) -> bool:
    """Whether a forward hook is there to compute a weight."""
    return isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)


def settled(module: nn.Module) -> nn.Module:
    """A module like ``module`` whose computed parameters are plain ones; itself if it has none.

    The other tensors, children and hooks are those of ``module``, which is not changed. The values
    are those of evaluation: no power iteration is done.
    """
    names = computed_by(module)
    if not names:
        return module
    values = {name: nn.Parameter(_value(module, name)) for name in names}
    dropped = {name + end for name in names for end in _LEFTOVERS}
    kind: type[nn.Module] = type(module)
    if is_parametrized(module):  # torch made a subclass
        kind = kind.__bases__[0]
        dropped.add("parametrizations")
    kept = {key: value for key, value in vars(module).items() if key not in names}
    for key in ("_parameters", "_buffers", "_modules"):
        kept[key] = {n: value for n, value in kept[key].items() if n not in dropped}
    kept["_parameters"] = values | kept["_parameters"]
    kept["_forward_pre_hooks"] = OrderedDict(
        (key, hook) for key, hook in module._forward_pre_hooks.items() if not is_computing(hook)
    )
    new = kind.__new__(kind)
    new.__dict__.update(kept)
    return new


def _value(module: Any, name: str) -> Tensor:
    """What the computed parameter ``name`` is in evaluation."""
    with torch.no_grad(), _evaluating(module):
        if is_parametrized(module, name):
            return getattr(module, name).detach()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.name == name:
                return hook.compute_weight(module).detach()
            if isinstance(hook, SpectralNorm) and hook.name == name:
                return hook.compute_weight(module, do_power_iteration=False).detach()
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                return hook.apply_mask(module).detach()
    raise AssertionError(f"{name} is not computed")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The parametrizations of ``module`` in eval mode inside the block."""
    if not is_parametrized(module):
        yield
        return
    lists: Any = module.parametrizations
    modes = [(each, each.training) for each in lists.modules()]
    lists.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
