"""``qkit.sparsify``: zeros in place of single weights, chosen by an algorithm, kept by masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.algorithms import Stats
from qkit.algorithms.sparse import Sparsity, kept, sparsegpt, wanda
from qkit.errors import CoverageError, InputError, UsageError, nearest
from qkit.flows.calibrate import collect, passes
from qkit.flows.evaluate import AnyInputs, as_inputs, eval_mode
from qkit.flows.ptq import check_rules, check_tensors, copied
from qkit.nn import QUANTIZED
from qkit.packing.store import turn
from qkit.pruning.importance import one_number
from qkit.pruning.masks import Masks
from qkit.spec import Recipe, Rule
from qkit.spec.plain import show

# Each with the scope that its paper compares weights in.
METHODS = {
    "magnitude": "layer",
    "random": "layer",
    "snip": "global",
    "taylor": "global",
    "wanda": "row",
    "sparsegpt": "layer",
}
CALIBRATED = ("wanda", "sparsegpt")
GRADIENTS = ("snip", "taylor")
# A share or a pattern for all layers, or one for each of those that names, classes or ``re:`` say.
Amount = float | str | Mapping[str, float | str]
Losses = Callable[[nn.Module], Tensor | Iterable[Tensor]]


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter that becomes sparse, and how much of it; ``kind`` says how its layer sees it as a
    matrix. A bias is a row."""

    name: str
    parameter: nn.Parameter
    module: Any
    sparsity: Sparsity

    @property
    def is_bias(self) -> bool:
        return self.parameter.dim() == 1

    @property
    def kind(self) -> Any:
        return QUANTIZED.get(type(self.module)) if self.name.endswith("weight") else None

    def matrix(self, values: Tensor) -> Tensor:
        """``values``, shaped like the parameter, as ``[rows, columns]``."""
        turned = self.kind.turned(self.module) if self.kind else 0
        return torch.atleast_2d(turn(values, turned) if turned else values).flatten(1)

    def back(self, matrix: Tensor) -> Tensor:
        """``matrix`` in the shape of the parameter."""
        turned = self.kind.turned(self.module) if self.kind else 0
        if not turned:
            return matrix.reshape(self.parameter.shape)
        return turn(matrix.reshape(turn(self.parameter, turned).shape), turned)


def sparsify(
    model: nn.Module,
    amount: Amount = 0.5,
    *,
    method: str = "magnitude",
    scope: str | None = None,
    biases: bool = False,
    calib: AnyInputs | None = None,
    loss: Losses | None = None,
    scores: Mapping[str, Tensor] | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    in_place: bool = False,
) -> tuple[nn.Module, Masks]:
    """Zero the share ``amount`` of the weights of ``model``, or all but N of M (``"2:4"``).

    A mapping of names, classes or ``re:`` patterns has an amount for each of the layers that it
    names; the others stay whole. With ``biases`` those of these layers lose the same share.

    ``method`` is a key of :data:`METHODS` (:mod:`qkit.algorithms.sparse`): ``wanda`` and
    ``sparsegpt`` learn from ``calib``, ``snip`` and ``taylor`` from ``loss(model)``, which gives
    the loss on some data, or one for each batch. ``scores`` by parameter name, such as those of
    :func:`qkit.pruning.masks.movement`, are taken instead. ``scope`` says what weights compete in:
    ``row``, ``layer`` or ``global``. ``ignore`` names modules to leave; tables stay whole.

    Returns the model (a copy unless ``in_place``) and its masks, to hold in training.

    Raises :class:`~qkit.errors.UsageError` for wrong options, :class:`~qkit.errors.InputError` for
    values that are not finite, and :class:`~qkit.errors.CoverageError` if no weight is left.
    """
    if method not in METHODS:
        raise UsageError("unknown method", got=repr(method), wanted=nearest(method, METHODS, 6))
    if scores is not None:
        method = "scores"
    scope = scope or METHODS.get(method, "layer")
    for need, given, names in (("calib", calib, CALIBRATED), ("loss", loss, GRADIENTS)):
        if method in names and given is None:
            raise UsageError(f"the method {method!r} needs {need}=", fix=f"{need}=...")
    if method == "sparsegpt" and scope == "global":
        raise UsageError("sparsegpt compensates in each layer", got="scope global", fix="layer")
    check_sparsify(model, amount, scope=scope, biases=biases, ignore=ignore)
    check_tensors(model)
    if not in_place:
        model = copied(model, [])
    wanted = sparsities(amount, scope, biases=biases)
    weights, masks = _masked(
        model, _weights(model, wanted, ignore, biases), method, calib, loss, scores, seed
    )
    if not weights:
        raise CoverageError(f"{method} finds no weight that can be zeroed")
    for weight in weights:
        if not weight.is_bias and not masks[weight.name].any():
            raise _empty(weight.name)
    found = Masks(masks)
    found.apply(model)
    return model, found


def check_sparsify(
    model: nn.Module,
    amount: Amount,
    *,
    scope: str,
    biases: bool = False,
    ignore: Sequence[str] = (),
) -> None:
    """Raise :class:`~qkit.errors.UsageError` for names of no module, and for a layer of which
    nothing would be left, as far as sizes alone tell."""
    wanted = sparsities(amount, scope, biases=biases)
    for weight in _weights(model, wanted, ignore, biases):
        sparsity, matrix = weight.sparsity, weight.matrix(weight.parameter.detach())
        count = matrix.shape[1] if sparsity.scope == "row" else matrix.numel()
        if not (sparsity.m or sparsity.scope == "global" or weight.is_bias or sparsity.left(count)):
            raise _empty(weight.name)


def _empty(name: str) -> UsageError:
    return UsageError(
        "a layer would be left without any weight",
        where=name,
        fix="a smaller amount, one for each layer, or leave this one out (ignore)",
    )


def sparsities(amount: Amount, scope: str, *, biases: bool = False) -> dict[str, Sparsity]:
    """What is asked of the modules that each pattern matches; the first that matches counts.

    Raises :class:`~qkit.errors.UsageError` for amounts that make no sense, or not together.
    """
    given = amount if isinstance(amount, Mapping) else {"*": amount}
    if wrong := [name for name in given if not isinstance(name, str)]:
        raise UsageError(
            "amounts are of layers by their names",
            got=show(wrong[0]),
            fix=f'"{wrong[0]}", as a text',
        )
    found = {pattern: Sparsity.parse(each, scope) for pattern, each in given.items()}
    if not found:
        raise UsageError("no layer is named that would lose weights", got="{}")
    if scope == "global" and len(found) > 1:
        raise UsageError(
            "an amount for each layer is not one for all of them together",
            got=f"scope global, amounts for {', '.join(found)}",
            fix="the scope layer, or one amount",
        )
    if biases and any(each.m for each in found.values()):
        raise UsageError("a pattern is along the inputs, which biases do not have", got=amount)
    return found


def _weights(
    model: nn.Module, wanted: Mapping[str, Sparsity], ignore: Sequence[str], biases: bool
) -> list[_Weight]:
    left = Recipe(tuple(Rule(pattern, None) for pattern in ignore))
    named = Recipe(tuple(Rule(pattern, None) for pattern in wanted))
    for recipe in (left, named):
        check_rules(recipe, model)
    found, seen = [], set()
    for prefix, module in model.named_modules():
        whole = left.rule_for(prefix, type(module).__name__) is not None
        if whole or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            seen |= {id(p) for p in module._parameters.values()}  # also where it is shared
    for prefix, module in model.named_modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        rule = named.rule_for(prefix, type(module).__name__)
        if rule is None or not any(p.dim() > 1 for p in own.values()):
            continue
        for leaf, parameter in own.items():
            is_bias = biases and leaf.startswith("bias")
            if (parameter.dim() > 1 or is_bias) and id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{leaf}" if prefix else leaf
                found.append(_Weight(name, parameter, module, wanted[rule.match]))
    return found


def _masked(
    model: nn.Module,
    weights: list[_Weight],
    method: str,
    calib: AnyInputs | None,
    loss: Losses | None,
    scores: Mapping[str, Tensor] | None,
    seed: int,
) -> tuple[list[_Weight], dict[str, Tensor]]:
    """The weights that the method can judge, and their masks; sparsegpt sets the weights too."""
    found: dict[str, Tensor] = {}
    if method in CALIBRATED:
        assert calib is not None
        weights = [w for w in weights if w.kind is not None and w.kind.has_vectors]
        owners = {w.name: w.module for w in weights}
        by_name = {w.name: w for w in weights}
        for part in passes(owners):
            for name, stats in collect(
                model, {n: [owners[n]] for n in part}, as_inputs(calib)
            ).items():
                found[name] = _learnt(by_name[name], method, stats)
    elif method in GRADIENTS:
        assert loss is not None
        with eval_mode(model):
            found = _gradients(weights, model, loss, squared=method == "taylor")
    elif method == "random":
        draw = torch.Generator().manual_seed(seed)
        found = {w.name: torch.rand(w.parameter.shape, generator=draw) for w in weights}
    elif method == "scores":
        assert scores is not None
        weights = [w for w in weights if w.name in scores]
        found = {w.name: scores[w.name] for w in weights}
    else:
        found = {w.name: w.parameter.detach().abs() for w in weights}
    if method == "sparsegpt":
        return weights, {name: values != 0 for name, values in found.items()}
    return weights, _chosen(weights, found)


def _learnt(weight: _Weight, method: str, stats: Stats) -> Tensor:
    """Scores, or for ``sparsegpt`` the new values, which the weight takes."""
    if not stats.vectors:
        raise InputError("the data never reached a layer", where=weight.name, fix="ignore it")
    matrix = weight.matrix(weight.parameter.detach())
    if method == "wanda":
        return weight.back(wanda(matrix, stats))
    new = weight.back(sparsegpt(matrix, weight.sparsity, stats)).to(weight.parameter.dtype)
    with torch.no_grad():
        weight.parameter.copy_(new)
    return new


def _gradients(
    weights: list[_Weight], model: nn.Module, loss: Losses, *, squared: bool
) -> dict[str, Tensor]:
    parameters = [w.parameter for w in weights]
    totals = [torch.zeros_like(p.detach(), dtype=torch.float32) for p in parameters]
    wanted = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            given = loss(model)
            for each in [given] if isinstance(given, Tensor) else given:
                grads = torch.autograd.grad(one_number(each), parameters, allow_unused=True)
                for total, p, grad in zip(totals, parameters, grads, strict=True):
                    if grad is not None:
                        product = (p.detach() * grad).float()
                        total += product.square() if squared else product
    finally:
        for p, want in zip(parameters, wanted, strict=True):
            p.requires_grad_(want)
    return {w.name: total.abs() for w, total in zip(weights, totals, strict=True)}


def _chosen(weights: list[_Weight], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise InputError("scores that are not finite", where=name)
    if not weights or weights[0].sparsity.scope != "global":
        return {w.name: w.back(kept(w.matrix(scores[w.name]), w.sparsity)) for w in weights}
    flat = torch.cat([scores[w.name].flatten().float() for w in weights])
    parts = kept(flat[None], weights[0].sparsity)[0].split([w.parameter.numel() for w in weights])
    return {w.name: part.view(w.parameter.shape) for w, part in zip(weights, parts, strict=True)}
