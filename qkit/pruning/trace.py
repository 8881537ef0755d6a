"""Tracing a model: its captured graph, and the labels of every value in it."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from qkit.errors import QkitError
from qkit.graph.capture import capture
from qkit.pruning import compute, shapes
from qkit.pruning.facts import Count, Facts
from qkit.pruning.labels import Layout

RULES = shapes.RULES | compute.RULES

# The attributes of torch's own modules, by the parameter and axis that they count.
_ATTRIBUTES: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    nn.Embedding: {"embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"embedding_dim": ("weight", 1)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.modules.conv._ConvNd: {"in_channels": ("weight", 1), "out_channels": ("weight", 0)},
    nn.modules.conv._ConvTransposeNd: {
        "in_channels": ("weight", 0),
        "out_channels": ("weight", 1),
    },
}  # fmt: skip

_LINE = re.compile(r'File "[^"]+", line \d+')


def trace(
    model: nn.Module,
    args: Sequence[Tensor],
    kwargs: Mapping[str, Tensor],
    *,
    through_norms: bool = False,
) -> Facts:
    """The facts of ``model``, called with ``args`` and ``kwargs`` in the mode that it is in.

    Where that leaves parameters untouched, what training does is traced as well: heads that are
    for training only still have to fit. Raises :class:`~qkit.errors.InputError` where the model
    cannot be captured as a graph.
    """
    facts = Facts(through_norms)
    facts.add_model(model)
    seen = _follow(facts, model, args, kwargs)
    if any(id(p) not in seen for p in model.parameters()) and not model.training:
        modes = [(module, module.training) for module in model.modules()]
        costs = list(facts.costs)
        try:
            seen |= _follow(facts, model.train(), args, kwargs)
        except QkitError:
            pass
        finally:
            for module, mode in modes:
                module.training = mode
        facts.costs = costs
    for key, slot in facts.slots.items():
        if key not in seen:  # nothing is known of how it is used
            for ids in slot.axes:
                facts.labels.freeze(ids)
    _count_attributes(facts, model)
    facts.close()
    return facts


def _follow(
    facts: Facts, model: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]
) -> set[int]:
    """Follow the labels through the graph of ``model``; return the tensors that it uses."""
    program = capture(model, args, kwargs, fixed=True).program
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    known: dict[fx.Node, Any] = {}
    seen: set[int] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            tensor = None
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                tensor = _tensor(model, spec.target)
            if tensor is not None and id(tensor) in facts.slots:
                slot = facts.slots[id(tensor)]
                seen |= {id(tensor)} if node.users else set()
                known[node] = Layout.of(facts.labels, tensor.shape, dict(enumerate(slot.axes)))
            else:
                known[node] = _frozen(facts, node)
        elif node.op == "call_function":
            known[node] = _call(facts, node, known)
        elif node.op == "output":
            results = program.graph_signature.output_specs
            names = {s.arg.name for s in results if s.kind is OutputKind.USER_OUTPUT}
            for value in node.all_input_nodes:
                if value.name in names and isinstance(known[value], Layout):
                    known[value].freeze()
        else:
            known[node] = _frozen(facts, node)
    return seen


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None)


def _frozen(facts: Facts, node: fx.Node) -> Any:
    found = tuple(Layout(facts.labels, shape) for shape in _shapes(node))
    return found[0] if len(found) == 1 else found


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [tuple(v.shape) if isinstance(v, Tensor) else () for v in values]


def _call(facts: Facts, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    given: Any = fx.node.map_arg(node.args, lambda n: known[n])
    if node.target is operator.getitem:
        return given[0][given[1]] if isinstance(given[0], tuple) else _frozen(facts, node)
    a = _arguments(node, known)
    name = a.op.removeprefix("aten::").partition(".")[0].removesuffix("_")
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return shapes.values(facts, a)
    rule = RULES.get(name) if a.op.startswith("aten::") else None
    if not a.tensors_in and rule is not shapes.blank:
        rule = shapes.blank
    return (rule or compute.stop)(facts, a)


def _arguments(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The arguments by the names of the schema, and what else the rules want to know."""
    schema = getattr(node.target, "_schema", None)
    values: dict[str, Any] = {}
    if schema is not None:
        names = [argument.name for argument in schema.arguments]
        values = {
            arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()
        }
        values |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    else:
        values = {f"arg{i}": value for i, value in enumerate(node.args)} | dict(node.kwargs)
    values = {
        name: fx.node.map_aggregate(value, lambda v: known[v] if isinstance(v, fx.Node) else v)
        for name, value in values.items()
    }
    tensors = [t for value in values.values() for t in _layouts(value)]
    around = (node.meta.get("nn_module_stack") or {"": ("", None)}).values()
    stack = [name.partition("@")[0] for name, _ in around]
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    out = _shapes(node)
    name = schema.name if schema is not None else str(node.target)
    overload = getattr(schema, "overload_name", "")
    more = {
        "op": f"{name}.{overload}" if overload else name,
        "modules": tuple(reversed(stack)),
        "module": stack[-1],
        "line": lines[-1] if lines else str(node.target),
        "shapes": out,
        "shape": out[0] if out else (),
        "tensors_in": tensors,
        "first": tensors[0] if tensors else None,
    }
    return SimpleNamespace(**values | more)


def _layouts(value: Any) -> list[Layout]:
    if isinstance(value, Layout):
        return [value]
    if isinstance(value, list | tuple):
        return [layout for each in value for layout in _layouts(each)]
    return []


def _count_attributes(facts: Facts, model: nn.Module) -> None:
    """Say what the attributes of torch's own modules count."""
    modules = dict(model.named_modules())
    # A program tells of modules that it no longer has.
    facts.counts = [c for c in facts.counts if hasattr(modules.get(c.module), c.attribute)]
    for name, module in modules.items():
        table: dict[str, tuple[str, int]] = {}
        for kind, attributes in _ATTRIBUTES.items():
            if isinstance(module, kind):
                table = table | attributes
        if getattr(module, "groups", 1) != 1:
            table = {}  # counted where the convolution was followed
        for attribute, (leaf, axis) in table.items():
            tensor = module._parameters.get(leaf)
            if tensor is None:
                tensor = module._buffers.get("running_mean")
            slot = None if tensor is None else facts.slots.get(id(tensor))
            if slot is not None:
                facts.counts.append(Count(name, attribute, slot.axes[axis]))
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            slot = facts.slots[id(module.weight)]
            for place, ids in enumerate(slot.axes):
                facts.counts.append(Count(name, "normalized_shape", ids, index=place))
