"""Names of tensors in opened modules, and where they were before.

A raw parameter that is a weight has ``weight`` in its name, and its bias ``bias`` at that place:
``weight_ih_l0`` and ``bias_ih_l0`` become ``weight_ih_l0.weight`` and ``weight_ih_l0.bias``. A bias
without such a weight keeps its name (``bias_k`` of an attention).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ATTENTION = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
              "in_proj_bias", "bias_k", "bias_v"}  # fmt: skip
# The class of a recurrent module by the gates of its weight_hh: rows for each hidden unit.
_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}


def opened_names(leaves: Iterable[str]) -> dict[str, str]:
    """Where the parameters ``leaves`` of one module are once it is opened.

    >>> opened_names(["weight_ih", "bias_ih", "bias_k"])
    {'weight_ih': 'weight_ih.weight', 'bias_ih': 'weight_ih.bias', 'bias_k': 'bias_k'}
    """
    known = set(leaves)

    def move(leaf: str) -> str:
        weight = leaf.replace("bias", "weight")
        if "weight" in leaf:
            return f"{leaf}.weight"
        return f"{weight}.bias" if weight in known and weight != leaf else leaf

    return {leaf: move(leaf) for leaf in leaves}


def closed_name(path: str) -> str:
    """Where the tensor ``path`` of an opened module was before; ``path`` where it did not move.

    >>> closed_name("weight_ih.bias")
    'bias_ih'
    """
    layer, _, leaf = path.rpartition(".")
    if "weight" not in layer or leaf not in ("weight", "bias"):
        return path
    return layer.replace("weight", leaf)


def opened_state(
    state: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What of a state dict looks like modules that can be opened.

    ``kinds`` are the classes of modules where they are known. Returns the new name of every tensor
    that moves, by its old one, and the class of every module that is opened, by its name. They are
    recognised by the names and shapes of their tensors; a class that computes something else with
    tensors of these names gets them back when it is loaded.
    """
    own: dict[str, list[str]] = defaultdict(list)
    for key in state:
        prefix, _, leaf = key.rpartition(".")
        own[prefix].append(leaf)
    moved: dict[str, str] = {}
    found: dict[str, str] = {}
    for prefix, leaves in own.items():
        dot = f"{prefix}." if prefix else ""
        tensors = {leaf: state[dot + leaf] for leaf in leaves}
        kind = _recurrent(tensors) or _attention(tensors, state.get(f"{dot}out_proj.weight"))
        if kind is None or kinds.get(prefix, kind) != kind:
            continue
        new = {dot + old: dot + name for old, name in opened_names(leaves).items() if old != name}
        if any(name.rpartition(".")[0] in own for name in new.values()):
            continue  # a module of that name is there already
        moved |= new
        found[prefix] = kind
    return moved, found


def _recurrent(tensors: Mapping[str, Tensor]) -> str | None:
    """The class of the recurrent module or cell that has these ``tensors``; None if none has."""
    matches = [_RECURRENT.fullmatch(leaf) for leaf in tensors]
    dims = ((2 if "weight" in leaf else 1, tensor.dim()) for leaf, tensor in tensors.items())
    if not all(matches) or any(want != have for want, have in dims):
        return None
    suffixes = {match[3] or "" for match in matches if match}
    if any(f"weight_{part}{end}" not in tensors for part in ("ih", "hh") for end in suffixes):
        return None
    cell, end = suffixes == {""}, min(suffixes)
    rows, columns = tensors[f"weight_hh{end}"].shape
    if ("" in suffixes and not cell) or not columns or not rows:
        return None
    if f"weight_hr{end}" in tensors:
        return None if cell else "LSTM"
    kind = _GATES.get(rows // columns) if rows % columns == 0 else None
    return f"{kind}Cell" if kind and cell else kind


def _attention(tensors: Mapping[str, Tensor], out_proj: Tensor | None) -> str | None:
    """``MultiheadAttention``, if the tensors are those of one."""
    weights = {leaf for leaf in tensors if "weight" in leaf}
    fused = weights == {"in_proj_weight"}
    if not (fused or weights == {"q_proj_weight", "k_proj_weight", "v_proj_weight"}):
        return None
    if tensors.keys() - _ATTENTION or out_proj is None or out_proj.dim() != 2:
        return None
    width = out_proj.shape[0]
    if any(tensors[leaf].dim() != 2 for leaf in weights):
        return None
    rows = {tensors[leaf].shape[0] for leaf in weights}
    return "MultiheadAttention" if rows == {3 * width if fused else width} else None
