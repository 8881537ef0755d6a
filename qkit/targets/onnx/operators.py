"""Layers that ONNX Runtime computes with operators of its own: in torch, and as ONNX.

``torch.ops.qkit_onnx`` stands for them in a graph until it is written:

``dynamic_linear``  int8 weights ``[K, N]`` and a uint8 range of the whole input at each call:
                    DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime makes one kernel
``global_average``  the mean of an image: GlobalAveragePool

What they compute in torch is the definition, with which the runtime must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from qkit.graph import clean, quiet
from qkit.graph.kinds import attribute, bias_of, dynamic_codes, is_image_mean, kind_of
from qkit.graph.tables import LOOKUP
from qkit.spec import Scheme
from qkit.targets.onnx.domain import microsoft
from qkit.targets.onnx.lstm import replace_lstm, rounded


@torch.library.custom_op("qkit_onnx::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` ``[..., K]`` by int8 ``weight`` ``[K, N]`` with ``scale`` ``[N]``, rounded to uint8."""
    return linear(rounded(x), (weight * scale).T, bias)


@dynamic_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("qkit_onnx::global_average", mutates_args=())
def global_average(x: Tensor, keepdim: bool) -> Tensor:
    """The mean of ``[N, C, H, W]`` over H and W."""
    return x.mean((2, 3), keepdim=keepdim)


@global_average.register_fake
def _(x: Tensor, keepdim: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], 1, 1) if keepdim else x.shape[:2])


def with_operators(
    module: fx.GraphModule, schemes: Mapping[str, Scheme] | None = None
) -> fx.GraphModule:
    """A copy of a converted program with the operators that ONNX Runtime fuses.

    ``dynamic_linear`` for each linear layer whose input is quantized at each call, ``dynamic_lstm``
    for the calls of an LSTM whose nodes ``schemes`` names, and ``global_average`` for the mean of
    an image, which torch.onnx would write as ReduceMean, for which there is no integer kernel.
    """
    with quiet():  # torch warns about how it copies a graph
        module = copy.deepcopy(module)
    graph = module.graph
    for node in list(graph.nodes):
        kind = kind_of(node)
        if kind is not None and kind.role == "recurrent":
            if scheme := (schemes or {}).get(node.name):
                replace_lstm(module, node, scheme.weight)
            continue
        if kind is not None and kind.name == "Linear":
            given = _dynamic_inputs(module, node)
            operator = torch.ops.qkit_onnx.dynamic_linear.default
        elif kind is not None and is_image_mean(node):
            keepdim = kind.name != "Mean" or (len(node.args) > 2 and bool(node.args[2]))
            given = (node.args[0], keepdim)
            operator = torch.ops.qkit_onnx.global_average.default
        else:
            continue
        if given is not None:
            with graph.inserting_before(node):
                new = graph.call_function(operator, given)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return clean(module)


def _dynamic_inputs(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of ``dynamic_linear``; None where the input has no range of its own.

    Of codes that are looked up too (a tied head), there is one tensor in the file, which ONNX
    Runtime turns when it loads it.
    """
    x: Any = node.args[0]
    codes = dynamic_codes(x)
    if codes is None:
        return None
    dequantized: Any = node.args[1]
    graph, stored = module.graph, dequantized.args[0]
    weight, scale = (_value(module, each) for each in dequantized.args[:2])
    name = f"_dynamic_{str(stored.target).replace('.', '_')}"  # once for layers that share it
    shared = [n for n in graph.nodes if n.op == "get_attr" and n.target == stored.target]
    looked_up = any(user.target is LOOKUP for each in shared for user in each.users)
    module.register_buffer(f"{name}_scale", scale.float().expand(weight.shape[0]).contiguous())
    if not looked_up:
        module.register_buffer(name, weight.T.contiguous())
    with graph.inserting_before(node):
        turned = graph.get_attr(str(stored.target) if looked_up else name)
        if looked_up:
            turned = graph.call_function(torch.ops.aten.t.default, (turned,))
        given = (turned, graph.get_attr(f"{name}_scale"))
    return (codes.args[0], *given, bias_of(node))


def _value(module: fx.GraphModule, given: Any) -> Tensor:
    """The tensor behind a ``get_attr`` node, or a number as a tensor."""
    return attribute(module, given) if isinstance(given, fx.Node) else torch.tensor([float(given)])


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes the operators of this file."""
    from onnxscript import opset21 as op

    float_ = 1  # onnx.TensorProto.FLOAT

    def write_dynamic_linear(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        codes, x_scale, x_zero = op.DynamicQuantizeLinear(x)
        product = op.Cast(op.MatMulInteger(codes, weight, x_zero), to=float_)
        y = op.Mul(product, op.Mul(x_scale, scale))
        return y if bias is None else op.Add(y, bias)

    def write_global_average(x: Any, keepdim: bool = True) -> Any:
        y = op.GlobalAveragePool(x)
        return y if keepdim else op.Flatten(y)

    def write_dynamic_lstm(
        x: Any, w: Any, r: Any, w_scale: Any, r_scale: Any, bias: Any, h: Any, c: Any
    ) -> Any:
        directions, size = int(r.shape[0]), int(r.shape[1])
        zeros = op.Constant(value=_int8_zeros(directions, 4 * size))
        inputs = [x, w, r, bias, None, h, c, None, w_scale, zeros, r_scale, zeros]
        direction = "bidirectional" if directions == 2 else "forward"
        return microsoft(
            "DynamicQuantizeLSTM", inputs, outputs=3, direction=direction, hidden_size=size
        )

    return {
        torch.ops.qkit_onnx.dynamic_lstm.default: write_dynamic_lstm,
        torch.ops.qkit_onnx.global_average.default: write_global_average,
        torch.ops.qkit_onnx.dynamic_linear.default: write_dynamic_linear,
    }


def _int8_zeros(*shape: int) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor("zeros", TensorProto.INT8, shape, [0] * math.prod(shape))
