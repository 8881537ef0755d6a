"""Whole blocks: those whose absence changes the outputs least are skipped.

A block is a module in an ``nn.Sequential`` or ``nn.ModuleList`` that takes a tensor and gives one
of the same shape, and has layers inside: the residual blocks of a stage, the layers of a
transformer. In its place stands a :class:`~qkit.pruning.surgery.Skipped`, which gives back what it
takes, so every name stays. They go one at a time, each time the one without which the outputs on
the given inputs are nearest to those of the whole model (a greedy choice like that of ShortGPT, Men
et al. 2024, arXiv 2403.03853, with the measured output in place of a proxy).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BudgetError, CoverageError, InputError, UsageError, nearest
from qkit.models import Inputs, run
from qkit.pruning.groups import Size, size
from qkit.pruning.plan import Limits
from qkit.pruning.structured import Cut, Pruned, Request
from qkit.pruning.surgery import EDITS, Edits, Skipped, edits_of
from qkit.pruning.trace import trace
from qkit.report import compare
from qkit.spec import Recipe, Rule


def prune_blocks(
    model: nn.Module, inputs: Inputs, request: Request, *, in_place: bool = False
) -> Pruned:
    """Skip blocks of ``model`` until the amount of ``request`` is gone, in the mode that it is in.

    Of each list at least ``limits.keep`` blocks stay, and what ``ignore`` names. The result is a
    copy unless ``in_place``. Raises what :func:`qkit.pruning.structured.prune_channels` raises, and
    :class:`~qkit.errors.UsageError` for options that are about channels.
    """
    _check(request)
    reference = run(model, inputs)
    smaller = model if in_place else copy.deepcopy(model)
    blocks = blocks_of(smaller, inputs, request)
    if not blocks:
        raise CoverageError(
            "no block can be skipped: none in a list gives a tensor of the shape that it takes"
        )
    before = now = _size(model, inputs)
    wanted = (1 - request.amount) * getattr(before, request.unit)
    left = Counter(_list_of(name) for name in blocks)
    whole, skipped = dict(left), dict[str, bool]()
    while getattr(now, request.unit) > wanted:
        possible = [n for n in blocks if n not in skipped and left[_list_of(n)] > _kept(request)]
        if not possible:
            raise BudgetError(
                f"not enough can be removed: the rest of the {request.unit} is not in blocks",
                got=f"{getattr(now, request.unit):.6g} at the least",
                wanted=f"at most {wanted:.6g}",
                fix="a smaller --amount, or channels too: prune without --blocks after this",
            )
        noise = {name: _without(smaller, name, inputs, reference, blocks) for name in possible}
        least = min(noise, key=lambda name: noise[name])
        if noise[least] == math.inf:
            raise CoverageError("the model does not work without any of its blocks", got=possible)
        skipped[least] = blocks[least]
        smaller.set_submodule(least, Skipped(smaller.get_submodule(least), blocks[least]))
        left[_list_of(least)] -= 1
        now = _size(smaller, inputs)
    edits = Edits(skipped=skipped)
    vars(smaller)[EDITS] = edits_of(model).then(edits)
    cuts = tuple(Cut(name, whole[name], left[name], 1) for name in whole)
    told = (
        f"{len(skipped)} blocks are skipped ({', '.join(skipped)}): train the model, as by distill"
    )
    return Pruned(smaller, cuts, before, now, (told,))


def blocks_of(model: nn.Module, inputs: Inputs, request: Request) -> dict[str, bool]:
    """The blocks that can be skipped, by name, and whether each gives a tuple of one tensor."""
    recipe = Recipe(tuple(Rule(pattern, None) for pattern in request.ignore))
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    if unused := recipe.unused(names.items()):
        match = unused[0].match
        raise UsageError("no module is called so", got=repr(match), wanted=nearest(match, names))
    seen: dict[str, list[bool | None]] = {}
    handles = []

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(name, []).append(_passes(args, kwargs, output))

        return note

    for parent, holder in model.named_modules():
        if not isinstance(holder, nn.Sequential | nn.ModuleList):
            continue
        for leaf, block in holder.named_children():
            name = f"{parent}.{leaf}" if parent else leaf
            layers = [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]
            left = recipe.rule_for(name, type(block).__name__) is not None
            if len(layers) > 1 and not left:
                handles.append(block.register_forward_hook(watch(name), with_kwargs=True))
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {n: each[0] for n, each in seen.items() if len(each) == 1 and each[0] is not None}
    # Of a list of blocks that could itself be skipped, its blocks are what goes.
    return {
        name: bool(alone)
        for name, alone in found.items()
        if not any(other.startswith(f"{name}.") for other in found)
    }


def _passes(args: Any, kwargs: Any, output: Any) -> bool | None:
    """Whether the output is a tuple of one tensor; None if it is not of the input's shape."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    alone = isinstance(output, tuple) and len(output) == 1
    result = output[0] if alone else output
    if not isinstance(given, Tensor) or not isinstance(result, Tensor):
        return None
    if given.shape != result.shape or given.dtype != result.dtype:
        return None
    return alone


def _check(request: Request) -> None:
    plain = Request()
    for name in ("importance", "through_norms", "loss"):
        if getattr(request, name) != getattr(plain, name):
            raise UsageError(f"{name} is for channels; blocks go by the outputs that they change")
    if request.limits != Limits(keep=request.limits.keep):
        raise UsageError("round_to and per_layer are for channels, not for blocks")
    if request.unit == "latency":
        raise UsageError(
            "blocks are counted, not timed", got="latency", wanted="macs, params, bytes"
        )


def _kept(request: Request) -> int:
    return request.limits.keep


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]


def _size(model: nn.Module, inputs: Inputs) -> Size:
    return size(trace(model, inputs.args, inputs.kwargs))


@torch.no_grad()
def _without(
    model: nn.Module, name: str, inputs: Inputs, reference: list[Tensor], blocks: dict[str, bool]
) -> float:
    """The noise of the outputs without the block, over their power; infinite if there are none."""
    block = model.get_submodule(name)
    model.set_submodule(name, Skipped(block, blocks[name]))
    try:
        found = compare(reference, run(model, inputs))
    except InputError:  # code that asks this block for more than an output
        return math.inf
    finally:
        model.set_submodule(name, block)
    return 0.0 if found.sqnr_db is None else 10 ** (-found.sqnr_db / 10)
