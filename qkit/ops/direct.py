"""A program that calls the operators of qkit as qkit's layers do: without torch's dispatcher.

A ``torch.export`` program names operators, and calling one costs some 20 microseconds of the
dispatcher and of Python; so does its check of the inputs. Both are more than the work of a small
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.ops import eager

_LINEAR = ("linear", "linear_codebook", "linear_dynamic", "linear_static")
# What calls an operator on the kernels: of what a call keeps, and the operator's arguments.
_CALLS: dict[Any, Callable[..., Tensor | None]] = {
    **{getattr(torch.ops.qkit, name).default: partial(eager.linear, name) for name in _LINEAR},
    torch.ops.qkit.convolution.default: eager.convolve,
    torch.ops.qkit.embedding.default: eager.embedding,
}
# So many kinds of inputs are remembered.
MAX_KNOWN = 64
_PLAIN = (bool, int, float, str, type(None))


class Direct(nn.Module):
    """One call of an operator in a program, with the pointers that it keeps between calls."""

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self._operator = operator
        self._call = _CALLS[operator]
        self._kept = eager.Kept()

    def forward(self, *args: Any) -> Tensor:
        """What the operator gives."""
        if not torch.compiler.is_compiling():
            done = self._call(self._kept, *args)
            if done is not None:
                return done
        return self._operator(*args)


def call_directly(program: fx.GraphModule) -> fx.GraphModule:
    """``program`` (the module of a ``torch.export`` program, which is changed) with its operators
    called directly where nobody watches, and the same inputs checked once."""
    nodes = [n for n in program.graph.nodes if n.target in _CALLS and not n.kwargs]
    if nodes:
        program.qkit_calls = nn.ModuleList(Direct(node.target) for node in nodes)
    for index, node in enumerate(nodes):
        with program.graph.inserting_before(node):
            new = program.graph.call_module(f"qkit_calls.{index}", node.args)
        new.meta = node.meta
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.recompile()
    _remember(program)
    return program


def _remember(program: fx.GraphModule) -> None:
    """Let the checks of inputs see each kind of them once: they read shapes and no values."""
    hooks = program._forward_pre_hooks
    known: set[tuple[Any, ...]] = set()
    for key in program._forward_pre_hooks_with_kwargs:
        hooks[key] = partial(_checked, hooks[key], known)


def _checked(
    check: Callable[..., Any],
    known: set[tuple[Any, ...]],
    program: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    kind = None
    if not torch.compiler.is_compiling():
        kind = *map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items())
        if kind in known:
            return
    check(program, args, kwargs)
    if kind is not None and len(known) < MAX_KNOWN:
        known.add(kind)


def _kind(value: Any) -> Any:
    """All that a check reads of an input; of what is no plain tensor or value, nothing else has
    the same."""
    if type(value) is Tensor:
        return value.shape, value.dtype, value.device
    return (type(value), value) if isinstance(value, _PLAIN) else object()
