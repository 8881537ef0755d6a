"""Students that are derived from their teacher: fewer layers."""

from __future__ import annotations

import copy

from torch import nn

from qkit.distill.match import Match
from qkit.errors import UsageError

# How configurations call the number of layers.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The name of the longest list of modules of one class in ``model``, and that list: the layers
    of a transformer, the blocks of a stage.

    Raises :class:`~qkit.errors.UsageError` if there is none of two or more.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(part) for part in module}) == 1
        and any(True for _ in module.parameters())
    ]
    if not found:
        raise UsageError(
            "the model has no list of layers of one class to keep some of",
            got=type(model).__name__,
            fix="give a student of your own",
        )
    return max(found, key=lambda pair: len(pair[1]))


def spread(count: int, total: int) -> list[int]:
    """``count`` of ``total`` indices, evenly, the last one among them, and the first one if there
    are two.

    >>> spread(3, 6), spread(1, 4)
    ([0, 2, 5], [3])
    """
    if count == 1:
        return [total - 1]
    return [i * (total - 1) // (count - 1) for i in range(count)]


def keep_layers(teacher: nn.Module, count: int) -> nn.Module:
    """A copy of ``teacher`` with ``count`` of its layers, spread evenly, and their weights.

    Layers must take what each other gives, as those of transformers do. A configuration's number
    of layers, and the layers' own indices, are made to fit.
    """
    name, blocks = blocks_of(teacher)
    if not 1 <= count < len(blocks):
        raise UsageError(
            "a student has fewer layers than its teacher, and at least one",
            where=name,
            got=count,
            wanted=f"1 to {len(blocks) - 1}",
        )
    student = copy.deepcopy(teacher)
    kept = [student.get_submodule(name)[index] for index in spread(count, len(blocks))]  # type: ignore[index]
    for index, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    owner, _, leaf = name.rpartition(".")
    made = nn.ModuleList(kept) if isinstance(blocks, nn.ModuleList) else nn.Sequential(*kept)
    if not name:  # the model itself is the list
        return made
    setattr(student.get_submodule(owner), leaf, made)
    for module in student.modules():
        config = getattr(module, "config", None)
        for key in (*_COUNTS, "layers"):
            holder = module if key in ("num_layers", "layers") and config is None else config
            if isinstance(getattr(holder, key, None), int) and getattr(holder, key) == len(blocks):
                setattr(holder, key, count)
    return student


def layer_map(student: nn.Module, teacher: nn.Module, kind: str = "features") -> list[Match]:
    """A match of each layer of ``student`` with one of ``teacher``, spread evenly."""
    (ours, few), (theirs, many) = blocks_of(student), blocks_of(teacher)
    if len(few) > len(many):
        raise UsageError("the student has more layers than the teacher", got=len(few))
    pairs = enumerate(spread(len(few), len(many)))
    return [Match(_join(ours, i), _join(theirs, j), kind, 1 / len(few)) for i, j in pairs]


def _join(name: str, index: int) -> str:
    return f"{name}.{index}" if name else str(index)
