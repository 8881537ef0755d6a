"""A bare state dict as a tree of modules, so that everything that works on a model works on it.

Classes are not stored in a state dict. ``name.weight`` with two dimensions is taken for the
weight of a Linear (of an Embedding, if the name says so and there is no bias), with three to five
for that of a Conv1d, Conv2d or Conv3d, unless a saved TorchScript module told the class. A wrong
guess costs no correctness: loading into the real model gives layers of any other class their float
weight back.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.nn.names import opened_state

_EMBEDDING = re.compile(r"(^|[._])(w[tp]e|\w*emb\w*|shared|\w*position\w*|tok\w*)([._]|$)", re.I)

# The classes of layers that are made, by the dimensions of their weight: first what is guessed.
_KINDS = {
    2: ("Linear", "Embedding", "EmbeddingBag"),
    3: ("Conv1d",),
    4: ("Conv2d",),
    5: ("Conv3d",),
}

# Classes that are opened (qkit.nn.open) into tensors that are not in the state dict as they are.
_IN_MEMORY = ("Bilinear", "Conv1D")


def without_form(kind: str) -> str:
    """Why a layer of the class ``kind``, which is not one that is quantized, stays in float."""
    return "normalisation stays in float" if "Norm" in kind else f"no quantized form of {kind} yet"


class Tensors(nn.Module):
    """Tensors of a state dict whose layer is not known."""

    def __init__(self, reason: str = "a tensor of a state dict whose layer is not known") -> None:
        super().__init__()
        self.reason_left = reason
        self.training = False

    def train(self, mode: bool = True) -> Tensors:
        """Stay as it is: it cannot be called, and one of its tensors may be named ``training``."""
        return self


def tree(
    state_dict: Mapping[str, Tensor],
    kinds: Mapping[str, str] | None = None,
    *,
    opened: bool = True,
) -> nn.Module:
    """Modules that hold the tensors of ``state_dict`` under the same names.

    What looks like a recurrent or attention module is ``opened``, and its tensors have the names
    that they have then (:func:`qkit.nn.names.opened_state`). ``kinds`` maps module names to class
    names where they are known. The result cannot be called.
    """
    for key in state_dict:
        if "" in key.split("."):
            raise InputError("a tensor's name has an empty part", where=repr(key))
    moved, found = opened_state(state_dict, kinds or {}) if opened else ({}, {})
    kinds = dict(kinds or {}) | dict.fromkeys(_layers(moved.values(), found), "Linear")
    own: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in _parameters(state_dict).items():
        prefix, _, leaf = moved.get(key, key).rpartition(".")
        own[prefix][leaf] = tensor
    parents = {
        ".".join(name.split(".")[:depth])
        for name in own.keys() - {""}
        for depth in range(name.count(".") + 1)
    }
    modules: dict[str, nn.Module] = {}
    for name in sorted(parents | own.keys(), key=lambda n: (n.count("."), n != "", n)):
        tensors = own.get(name, {})
        kind = kinds.get(name)
        layer = None if name in parents else _layer(name, tensors, kind)
        modules[name] = layer or _container(name, tensors, kind)
    root = modules.setdefault("", Tensors())
    # In the order of the state dict, so that a report reads like the model.
    for name in dict.fromkeys(_with_parents(own)):
        parent, _, leaf = name.rpartition(".")
        modules[parent]._modules.setdefault(leaf, modules[name])
    for name, opened_from in found.items():
        vars(modules[name])["opened_from"] = opened_from
    return root


def _layers(moved: Iterable[str], found: Mapping[str, str]) -> Iterator[str]:
    """The layers inside the modules ``found``: the owners of what ``moved``, and ``out_proj``."""
    yield from (name.rpartition(".")[0] for name in moved)
    for name, kind in found.items():
        if kind == "MultiheadAttention":
            yield f"{name}.out_proj" if name else "out_proj"


def _parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors as Parameters; those that are the same memory, the same Parameter.

    On the meta device there is no memory; there, the same tensor is.
    """
    made: dict[tuple, nn.Parameter] = {}

    def parameter(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        place = id(tensor) if tensor.is_meta and tensor.numel() else tensor.data_ptr()
        memory = (place, tensor.shape, tensor.stride(), tensor.dtype)
        new = nn.Parameter(tensor.detach(), requires_grad=False)
        return made.setdefault(memory, new) if place else new  # an empty tensor has no memory

    return {key: parameter(tensor) for key, tensor in state_dict.items()}


def _with_parents(names: Mapping[str, object]) -> list[str]:
    found = []
    for name in names:
        parts = name.split(".") if name else []
        found += [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return found


def _layer(name: str, tensors: Mapping[str, Tensor], kind: str | None) -> nn.Module | None:
    """A layer that holds ``tensors``, if they look like one's."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.numel() == 0 or tensors.keys() - {"weight", "bias"}:
        return None
    if not all(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
        return None
    kinds = _KINDS.get(weight.dim(), ())
    if kind is None and kinds:
        named = weight.dim() == 2 and bias is None and _EMBEDDING.search(name) is not None
        kind = "Embedding" if named else kinds[0]
    if kind not in kinds:
        return None
    rows, columns, *kernel = weight.shape
    table = kind.startswith("Embedding")
    if bias is not None and (table or bias.shape != (rows,)):
        return None
    given: tuple = (rows, columns) if table else (columns, rows)
    with torch.device("meta"):
        layer: Any = getattr(nn, kind)(*given, *([tuple(kernel)] if kernel else []))
    layer.weight = weight
    if not table:
        layer.bias = bias
    return layer.eval()


def _container(name: str, tensors: Mapping[str, Tensor], kind: str | None) -> Tensors:
    if any(kind in kinds for kinds in _KINDS.values()):
        module = Tensors(f"its tensors are not those of a layer of the class {kind}")
    elif kind is not None and kind.startswith("ConvTranspose"):
        module = Tensors("its tensors do not tell in how many groups its channels are")
    elif kind is not None and (kind in _IN_MEMORY or kind.endswith("Experts")):
        module = Tensors(f"a {kind} is opened where the model is in memory, not as tensors")
    elif kind is not None:
        module = Tensors(without_form(kind))
    else:
        module = Tensors()
    for leaf, tensor in tensors.items():
        # Not register_parameter: a state dict may use any name, also one that nn.Module has.
        if isinstance(tensor, nn.Parameter):
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor
    return module
