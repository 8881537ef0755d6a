"""Batch normalisation in a graph that is trained: folded where a convolution comes before it.

A graph is captured in eval mode. :func:`fold` takes each normalisation behind a convolution out of
it, so that it is annotated like the graph that will be deployed. :func:`unfold` puts modules in
their place that train as the deployed graph will compute (Jacob et al. 2018, arXiv 1712.05877,
section 3.2, as torch's ``nniqat.ConvBn2d`` approximates it). With ``s = gamma / sqrt(var + eps)``
of the running statistics and ``q`` the rounding to codes,

    training   y = BN(conv(x, q(w s)) / s + b)              with the statistics of the batch
    else       y = conv(x, q(w s)) + (b - mean) s + beta     which is what is deployed

:func:`settle` writes ``w s`` and ``(b - mean) s + beta`` into the graph and takes the modules out,
before the conversion; :func:`plain_norms` those of normalisations that stay one, behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qkit.graph.kinds import bias_of, kind_of, uses_of, weight_of

KEY = "qkit_norm"
# A channel that a normalisation switches off has s = 0, by which nothing can be divided.
LEAST = 1e-12


@dataclass(frozen=True)
class Norm:
    """The names of the tensors of a normalisation (None: it has none), and its numbers."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    momentum: float
    eps: float


class _Mode(nn.Module):
    """Whether the statistics of the batch count: in training, until they are ``frozen``."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.eps, self.momentum, self.frozen = norm.eps, norm.momentum, False

    @property
    def live(self) -> bool:
        return self.training and not self.frozen

    def scale(self, gamma: Tensor | None, var: Tensor) -> Tensor:
        """``s``."""
        s = (var + self.eps).rsqrt()
        s = s if gamma is None else s * gamma
        return torch.where(s.abs() < LEAST, torch.full_like(s, LEAST), s)


class ScaledWeight(_Mode):
    """``w s``."""

    def forward(self, w: Tensor, gamma: Tensor | None, var: Tensor) -> Tensor:
        """The weight of the deployed convolution."""
        return w * self.scale(gamma, var).reshape(-1, *[1] * (w.dim() - 1))


class FoldedBias(_Mode):
    """``(b - mean) s + beta``, or zero in training."""

    def forward(
        self, b: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        """The bias of the deployed convolution."""
        if self.live:
            return torch.zeros_like(b)
        folded = (b - mean) * self.scale(gamma, var)
        return folded if beta is None else folded + beta


class Renormalised(_Mode):
    """``BN(y / s + b)`` in training, else ``y``."""

    def forward(
        self,
        y: Tensor,
        b: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> Tensor:
        """What comes behind the convolution."""
        if not self.live:
            return y
        shape = [1, -1, *[1] * (y.dim() - 2)]
        y = y / self.scale(gamma, var).reshape(shape) + b.reshape(shape)
        return F.batch_norm(y, mean, var, gamma, beta, True, self.momentum, self.eps)


class Normalised(_Mode):
    """A normalisation that stays one."""

    def forward(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> Tensor:
        """The batch normalisation of ``x``."""
        return F.batch_norm(x, mean, var, gamma, beta, self.live, self.momentum, self.eps)


def _norm_of(node: fx.Node) -> Norm | None:
    """The normalisation that ``node`` computes with running statistics; None for other nodes."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.name != "aten::batch_norm":
        return None
    names = [None if n is None else str(n.target) for n in node.args[1:5]]  # type: ignore[union-attr]
    if names[2] is None or names[3] is None:
        return None
    return Norm(names[0], names[1], names[2], names[3], node.args[6], node.args[7])  # type: ignore[arg-type]


def own_tensors(module: nn.Module) -> None:
    """Give a captured module copies of its parameters and buffers, which are those of the model."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                trained = parameter.is_floating_point()
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), trained)
        for name, tensor in part._buffers.items():
            part._buffers[name] = None if tensor is None else tensor.detach().clone()


def fold(module: fx.GraphModule) -> None:
    """Take the normalisations behind convolutions out of ``module``; :func:`unfold` knows where.

    Left are those behind a convolution whose output or weight is used elsewhere too.
    """
    users = uses_of(module)
    for node in list(module.graph.nodes):
        norm = _norm_of(node)
        conv: Any = None if norm is None else node.args[0]
        kind = kind_of(conv)
        if norm is None or kind is None or not kind.name.startswith("Conv") or len(conv.users) > 1:
            continue
        weight = weight_of(conv)
        if weight is None or users[str(weight[0].target)] > 1:
            continue
        bias = bias_of(conv)
        if bias is not None and users[str(bias.target)] > 1:
            continue
        if bias is None:
            give_bias(module, conv, str(weight[0].target))
        conv.meta[KEY] = (
            norm,
            {
                name: attribute_of(module, name)
                for name in (norm.weight, norm.bias, norm.mean, norm.var)
                if name is not None
            },
        )
        node.replace_all_uses_with(conv)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def merge(module: fx.GraphModule) -> None:
    """:func:`fold` for a graph that is not trained: the folded weights and biases are in it."""
    fold(module)
    for node in module.graph.nodes:
        if KEY not in node.meta:
            continue
        norm, tensors = node.meta.pop(KEY)
        weight, bias = (attribute_of(module, str(each.target)) for each in node.args[1:3])
        gamma, beta, mean, var = (
            None if name is None else tensors[name].detach()
            for name in (norm.weight, norm.bias, norm.mean, norm.var)
        )
        folded = ScaledWeight(norm).eval()(weight.detach(), gamma, var)
        moved = FoldedBias(norm).eval()(bias.detach(), gamma, beta, mean, var)
        for each, tensor in zip(node.args[1:3], (folded, moved), strict=True):
            put(module, str(each.target), nn.Parameter(tensor, requires_grad=False))


def give_bias(module: fx.GraphModule, conv: fx.Node, weight: str) -> None:
    """A bias of zeros, which is no parameter, for a convolution or linear layer without one."""
    name = f"{weight}_bias"
    owner, _, leaf = name.rpartition(".")
    zeros = torch.zeros_like(attribute_of(module, weight).flatten(1)[:, 0])
    module.get_submodule(owner).register_buffer(leaf, zeros)
    with module.graph.inserting_before(conv):
        node = module.graph.get_attr(name)
    node.meta["val"] = zeros
    conv.args = (*conv.args[:2], node, *conv.args[3:])


def attribute_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer ``name`` itself."""
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), leaf)
    return found


def unfold(prepared: fx.GraphModule) -> None:
    """Put modules that can be trained in the place of the folded normalisations of ``prepared``,
    of those that stayed, and of dropouts."""
    graph = prepared.graph
    for index, node in enumerate(list(graph.nodes)):
        if KEY in node.meta:
            norm, tensors = node.meta[KEY]
            for name, tensor in tensors.items():
                put(prepared, name, tensor)
            _unfold_one(prepared, node, norm, f"folded_{index}")
        elif (plain := _norm_of(node)) is not None:
            with graph.inserting_before(node):
                made = _call(prepared, f"norm_{index}", Normalised(plain), node.args[:5])
            made.meta = dict(node.meta) | {KEY: (node.target, node.args)}
            node.replace_all_uses_with(made)
            graph.erase_node(node)
        elif kind_of(node) is not None and kind_of(node).name == "Dropout":  # type: ignore[union-attr]
            with graph.inserting_before(node):
                drop = nn.Dropout(float(node.args[1]))
                made = _call(prepared, f"dropout_{index}", drop, node.args[:1])
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    graph.lint()
    prepared.recompile()


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Have ``tensor`` under ``name``, whose owners may be missing."""
    owner = module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _call(module: fx.GraphModule, name: str, called: nn.Module, args: Any) -> fx.Node:
    module.add_submodule(name, called)
    return module.graph.call_module(name, tuple(args))


def _unfold_one(prepared: fx.GraphModule, conv: fx.Node, norm: Norm, name: str) -> None:
    graph = prepared.graph

    def get(tensor: str | None) -> fx.Node | None:
        return None if tensor is None else graph.get_attr(tensor)

    def behind(edge: Any) -> tuple[fx.Node, fx.Node]:
        """The node of a tensor, and what reads it: its observer, or the convolution itself."""
        return (edge, conv) if edge.op == "get_attr" else (edge.args[0], edge)

    weight, reader = behind(conv.args[1])
    with graph.inserting_before(reader):
        gamma, var = get(norm.weight), get(norm.var)
        scaled = _call(prepared, f"{name}_weight", ScaledWeight(norm), (weight, gamma, var))
    reader.replace_input_with(weight, scaled)
    bias, reader = behind(conv.args[2])
    with graph.inserting_before(reader):
        four = [get(tensor) for tensor in (norm.weight, norm.bias, norm.mean, norm.var)]
        folded = _call(prepared, f"{name}_bias", FoldedBias(norm), (bias, *four))
    reader.replace_input_with(bias, folded)
    with graph.inserting_after(conv):
        after = _call(prepared, f"{name}_output", Renormalised(norm), ())
    with graph.inserting_before(after):
        four = [get(tensor) for tensor in (norm.weight, norm.bias, norm.mean, norm.var)]
    conv.replace_all_uses_with(after)
    after.args = (conv, bias, *four)
    after.meta = {"val": conv.meta["val"]}


def freeze(prepared: nn.Module, frozen: bool) -> None:
    """Whether the normalisations of ``prepared`` keep to their running statistics."""
    for module in prepared.modules():
        if isinstance(module, _Mode):
            module.frozen = frozen


@torch.no_grad()
def settle(prepared: fx.GraphModule) -> dict[str, Tensor]:
    """Undo :func:`unfold` in eval mode, but for the normalisations that stay: the graph as
    :func:`fold` left it, with the trained and folded values. Return the float weights by name."""
    graph = prepared.graph
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, ScaledWeight | FoldedBias):
            args = [n if n is None else attribute_of(prepared, str(n.target)) for n in node.args]
            value = module.eval()(*args).detach()
            node.meta["settled"] = value
    for node in list(graph.nodes):
        called = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if "settled" in node.meta:
            put(prepared, str(node.args[0].target), nn.Parameter(node.meta["settled"]))
            node.replace_all_uses_with(node.args[0])
        elif isinstance(called, Renormalised | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
        else:
            continue
        graph.erase_node(node)
    graph.eliminate_dead_code()
    prepared.delete_all_unused_submodules()
    prepared.recompile()
    named = dict(prepared.named_parameters())
    return {name: tensor.detach() for name, tensor in named.items()}


def plain_norms(converted: fx.GraphModule) -> None:
    """Make the normalisations that stayed operators again.

    Behind the conversion, because torchao's looks for patterns of its own around them, which takes
    half a minute.
    """
    graph = converted.graph
    for node in list(graph.nodes):
        module = converted.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Normalised):
            target, args = node.meta[KEY]
            with graph.inserting_before(node):
                made = graph.call_function(target, (*node.args, *args[5:]))
            made.meta = {key: value for key, value in node.meta.items() if key != KEY}
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    converted.delete_all_unused_submodules()
    converted.recompile()
