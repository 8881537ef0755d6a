"""``torch.export`` programs: read safely, and turned back into layers.

A program calls ``aten.linear`` and ``aten.conv2d`` on parameters; :func:`modularize` gives those
parameters their ``nn.Linear`` and ``nn.Conv2d`` back under the same names, so that everything that
works on a model works on a program.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.errors import InputError
from qkit.models.inputs import Inputs
from qkit.models.program_safety import check_program

_LINEAR = torch.ops.aten.linear.default
_CONV2D = {torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding}


def read_program(path: Path, *, trust: bool) -> tuple[nn.Module, Inputs | None]:
    """The program in ``path`` as a module with real layers, and its stored example inputs."""
    if not trust:
        check_program(path)
    try:
        # From a handle: torch warns about names that do not end in .pt2.
        with _quiet(), path.open("rb") as file:
            program = torch.export.load(file)
            module = program.module()
        # A program's graph has one mode, and its module refuses to be asked for another.
        for name in ("train", "eval"):
            vars(module).pop(name, None)
        return modularize(module), _inputs(program.example_inputs)
    except Exception as error:  # a corrupt archive raises whatever its bytes lead to
        first = (str(error).strip().splitlines() or [""])[0][:160]
        raise InputError(
            f"cannot read the torch.export program: {type(error).__name__}: {first}",
            where=str(path),
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the stack traces that torch logs, and without its warnings of its own ways."""
    logger = logging.getLogger("torch")
    names = [logger, *(logging.getLogger(f"torch.{n}") for n in ("export", "_export"))]
    names += [logging.getLogger("torch.export.pt2_archive._package")]
    names += [logging.getLogger("torch._export.serde.serialize")]
    before = [(each, each.level) for each in names]
    for each in names:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in before:
            each.setLevel(level)


def _inputs(example: Any) -> Inputs | None:
    if example is None:
        return None
    args, kwargs = example
    values = [*args, *kwargs.values()]
    if not values or not all(isinstance(value, Tensor) for value in values):
        return None
    return Inputs(tuple(args), dict(kwargs), "stored in the torch.export program")


def modularize(module: fx.GraphModule) -> fx.GraphModule:
    """Replace calls of linear and conv2d on parameters by calls of layers, in place.

    A parameter that anything else reads as well stays where it is, and its calls stay as they
    are. Outputs are bit-identical: a layer's forward is the same operator.
    """
    graph = module.graph
    readers: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "get_attr":
            readers[node.target] += list(node.users)
    layers: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and (node.target == _LINEAR or node.target in _CONV2D):
            owner = _owner(node.args[1])
            if owner is not None and not node.kwargs:
                layers[owner].append(node)
    for owner, calls in layers.items():
        if _replaceable(owner, calls, readers, module):
            _install(module, owner, calls)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _owner(weight: object) -> str | None:
    """``a.b`` for the parameter ``a.b.weight``."""
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        name = str(weight.target)
        return name.removesuffix(".weight") if name.endswith(".weight") else None
    return None


def _replaceable(
    owner: str, calls: list[fx.Node], readers: dict[str, list[fx.Node]], module: fx.GraphModule
) -> bool:
    """Whether the module ``owner`` can become one layer that all ``calls`` call."""
    first = calls[0]
    place = module.get_submodule(owner)
    if place._modules or place._buffers or place._parameters.keys() - {"weight", "bias"}:
        return False
    weight = place._parameters.get("weight")
    if weight is None or weight.dim() != (2 if first.target == _LINEAR else 4):
        return False
    bias = first.args[2] if len(first.args) > 2 else None
    if bias is not None and getattr(bias, "target", None) != f"{owner}.bias":
        return False
    if bias is None and "bias" in place._parameters:
        return False
    same = all(
        call.target == first.target
        and [getattr(a, "target", a) for a in call.args[1:]]
        == [getattr(a, "target", a) for a in first.args[1:]]
        for call in calls
    )
    mine = set(calls)
    return same and all(
        reader in mine for name in ("weight", "bias") for reader in readers[f"{owner}.{name}"]
    )


def _install(module: fx.GraphModule, owner: str, calls: list[fx.Node]) -> None:
    old = module.get_submodule(owner)
    weight, bias = old._parameters["weight"], old._parameters.get("bias")
    assert weight is not None
    with torch.device("meta"):
        layer: Any = _linear(weight) if calls[0].target == _LINEAR else _conv2d(weight, calls[0])
    layer.weight = weight  # the very Parameter, so that ties survive
    layer.bias = bias
    parent, _, leaf = owner.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = layer.train(module.training)
    for call in calls:
        with module.graph.inserting_before(call):
            new = module.graph.call_module(owner, (call.args[0],))
        new.meta = dict(call.meta)
        call.replace_all_uses_with(new)
        module.graph.erase_node(call)


def _linear(weight: Tensor) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0])


def _conv2d(weight: Tensor, call: fx.Node) -> nn.Module:
    given: list[Any] = [*call.args[3:], *(1, 0, 1, 1)[max(len(call.args) - 3, 0) :]]
    stride, padding, dilation, groups = given
    if call.target == torch.ops.aten.conv2d.padding and len(call.args) < 5:
        padding = "valid"

    def pair(value: Any) -> Any:  # the operator takes [n] for [n, n]
        return tuple(value) * (2 // len(value)) if isinstance(value, list | tuple) else value

    rows, columns, height, width = weight.shape
    geometry = pair(stride), pair(padding), pair(dilation), groups
    return nn.Conv2d(columns * groups, rows, (height, width), *geometry)
