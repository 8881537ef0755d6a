"""The one function of qkit that changes a model: it puts modules in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qkit.nn.factorized import Factorized
from qkit.nn.layer import QLayer
from qkit.nn.opened import Opened

# Where a module keeps what it calls when it is called, and when gradients flow back.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put ``replacements[name]`` where the module ``name`` is, in place; return the model.

    A module that is reachable by several names is replaced at all of them. Its hooks on forward
    and backward move to the replacement; those on its state dict, which know the float tensors,
    do not. If the model itself (name ``""``) is replaced, the replacement is returned.
    """
    by_identity = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    for name, new in replacements.items():
        old = model.get_submodule(name)
        for hooks in _HOOKS:  # the very dicts, so that the hooks' handles can still remove them
            setattr(new, hooks, getattr(old, hooks))
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in by_identity:
                parent._modules[child_name] = by_identity[id(child)]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            _call_sublayers(module)
    return by_identity.get(id(model), model)


def _call_sublayers(module: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """Keep torch's fused inference path from reading the weights of layers that were replaced.

    In a layer, ``activation_relu_or_gelu`` only tells whether the fused path knows the activation;
    0 sends ``forward`` through the sublayers. The encoder around it turns padded input into a
    nested tensor, which only the fused path takes.
    """
    if not any(isinstance(child, QLayer | Opened | Factorized) for child in module.modules()):
        return
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    else:
        module.activation_relu_or_gelu = 0
