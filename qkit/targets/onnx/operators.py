"""Layers that ONNX Runtime computes with operators of its own: in torch, and as ONNX.

``torch.ops.qkit_onnx`` stands for them in a graph until it is written:

``dynamic_linear``  int8 weights ``[K, N]`` and a uint8 range of the whole input at each call:
                    DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime makes one kernel
``matmul_nbits``    weights of 4 or 8 bits in blocks along K: MatMulNBits
``global_average``  the mean of an image: GlobalAveragePool

What they compute in torch is the definition, with which the runtime must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear, pad

from qkit.graph import clean, quiet
from qkit.graph.kinds import attribute, bias_of, dynamic_codes, is_image_mean, kind_of
from qkit.nn import QLayer, swap
from qkit.nn.linear import QLinear
from qkit.numerics import choose_qparams, fake_quantize
from qkit.spec import Int, PerGroup, QSpec, Scheme
from qkit.targets.onnx.lstm import replace_lstm, rounded


@torch.library.custom_op("qkit_onnx::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` ``[..., K]`` by int8 ``weight`` ``[K, N]`` with ``scale`` ``[N]``, rounded to uint8."""
    return linear(rounded(x), (weight * scale).T, bias)


@dynamic_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("qkit_onnx::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    block: int,
    level: int,
) -> Tensor:
    """``x`` ``[..., columns]`` by the weight in ``codes`` (:func:`nbits_tensors`).

    ``level`` is the accuracy level of ONNX Runtime: with 4, each block of ``x`` is first rounded to
    int8 with a scale of its own.
    """
    if level == 4:
        acts = QSpec(Int(8, narrow=True), PerGroup(block), True, "dynamic")
        x = fake_quantize(x, choose_qparams(x, acts), acts)
    values = from_blob(codes, bits).float()
    middle = 1 << (bits - 1)
    if zero_points is not None:
        values = values - from_blob(zero_points, bits)[:, : scales.shape[1], None]
    else:
        values = values - middle
    weight = (values * scales[..., None]).flatten(1)[:, :columns]
    return linear(x, weight, bias)


@matmul_nbits.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    block: int,
    level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def to_blob(values: Tensor, bits: int) -> Tensor:
    """uint8 values along the last axis, two of 4 bits in a byte, the first in the low half."""
    if bits == 8:
        return values
    even = pad(values, (0, values.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def from_blob(blob: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`to_blob`, up to a value that filled the last byte."""
    if bits == 8:
        return blob
    return torch.stack([blob & 15, blob >> 4], -1).flatten(-2)


def nbits_tensors(layer: QLinear) -> dict[str, Tensor | None]:
    """What MatMulNBits takes of a layer whose scales are per group.

    ``codes`` uint8 ``[N, blocks, block * bits / 8]``, with ``2^(bits - 1)`` added and the last
    block filled with zeros; ``scales`` float ``[N, blocks]``; ``zero_points`` uint8
    ``[N, ceil(blocks * bits / 8)]`` with the same offset, or None where symmetric.
    """
    q = layer.qtensor()
    bits, block = layer.bits, layer.group
    middle = 1 << (bits - 1)
    codes = pad(q.codes, (0, -q.codes.shape[1] % block)).to(torch.int16) + middle
    blocks = codes.to(torch.uint8).unflatten(1, (-1, block))
    zero = q.qparams.zero_point
    if zero is not None:
        zero = to_blob((zero.to(torch.int16) + middle).to(torch.uint8), bits)
    return {
        "codes": to_blob(blocks, bits).contiguous(),
        "scales": q.qparams.scale.float(),
        "zero_points": zero,
    }


class NBitsLinear(nn.Module):
    """A linear layer that is written as MatMulNBits."""

    def __init__(self, layer: QLinear, level: int) -> None:
        super().__init__()
        self.columns, self.bits, self.block, self.level = (
            layer.in_features,
            layer.bits,
            layer.group,
            level,
        )
        for name, tensor in nbits_tensors(layer).items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., columns]`` -> ``[..., N]``."""
        return matmul_nbits(
            x,
            self.codes,
            self.scales,
            self.zero_points,
            self.bias,
            self.columns,
            self.bits,
            self.block,
            self.level,
        )


def with_nbits(qmodel: nn.Module, level: int) -> nn.Module:
    """A copy of a quantized model whose layers are written as MatMulNBits."""
    model = copy.deepcopy(qmodel)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert all(isinstance(m, QLinear) for m in model.modules() if isinstance(m, QLayer))
    return swap(model, {name: NBitsLinear(layer, level) for name, layer in layers.items()})


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
    for index, node in enumerate(list(graph.nodes)):
        kind = kind_of(node)
        if kind is not None and kind.role == "recurrent":
            if scheme := (schemes or {}).get(node.name):
                replace_lstm(module, node, scheme.weight)
            continue
        if kind is not None and kind.name == "Linear":
            given = _dynamic_inputs(module, node, index)
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


def _dynamic_inputs(module: fx.GraphModule, node: fx.Node, index: int) -> tuple[Any, ...] | None:
    """The arguments of ``dynamic_linear``; None where the input has no range of its own."""
    x: Any = node.args[0]
    codes = dynamic_codes(x)
    if codes is None:
        return None
    dequantized: Any = node.args[1]
    weight, scale = (_value(module, each) for each in dequantized.args[:2])
    module.register_buffer(f"_dynamic_weight_{index}", weight.T.contiguous())
    scales = scale.float().expand(weight.shape[0]).contiguous()
    module.register_buffer(f"_dynamic_scale_{index}", scales)
    with module.graph.inserting_before(node):
        given = [module.graph.get_attr(f"_dynamic_{each}_{index}") for each in ("weight", "scale")]
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

    def write_matmul_nbits(
        x: Any,
        codes: Any,
        scales: Any,
        zero_points: Any = None,
        bias: Any = None,
        columns: int = 0,
        bits: int = 0,
        block: int = 0,
        level: int = 0,
    ) -> Any:
        rows = int(codes.shape[0])
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        inputs = [x, codes, scales, zero_points, None, bias]
        return _microsoft("MatMulNBits", inputs, **sizes, accuracy_level=level)[0]

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
        return _microsoft(
            "DynamicQuantizeLSTM", inputs, outputs=3, direction=direction, hidden_size=size
        )

    return {
        torch.ops.qkit_onnx.dynamic_lstm.default: write_dynamic_lstm,
        torch.ops.qkit_onnx.global_average.default: write_global_average,
        torch.ops.qkit_onnx.dynamic_linear.default: write_dynamic_linear,
        torch.ops.qkit_onnx.matmul_nbits.default: write_matmul_nbits,
    }


def _int8_zeros(*shape: int) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor("zeros", TensorProto.INT8, shape, [0] * math.prod(shape))


def _microsoft(
    operator: str, inputs: list[Any], *, outputs: int = 1, **attributes: int | str
) -> Any:
    """Record an operator of ONNX Runtime's own domain, which has no schema for onnxscript."""
    import onnx_ir
    from onnxscript import evaluator

    while inputs[-1] is None:
        inputs.pop()
    made = onnx_ir.convenience.convert_attributes(attributes)
    node = onnx_ir.Node("com.microsoft", operator, inputs, made, num_outputs=outputs, version=1)
    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
    return node.outputs
