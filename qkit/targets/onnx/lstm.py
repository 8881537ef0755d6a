"""LSTM layers for ONNX Runtime: int8 weights, and activations rounded at each step.

``qkit_onnx::dynamic_lstm`` is one layer of one or two directions, written as DynamicQuantizeLSTM.
The input is rounded to uint8 with one range for the whole sequence, the hidden state with a range
at each step. What it computes in torch is the definition.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from qkit.graph.kinds import attribute
from qkit.numerics import choose_qparams, fake_quantize, quantize
from qkit.spec import Int, PerTensor, QSpec

_UINT8 = QSpec(Int(8, signed=False), PerTensor(), False, "dynamic")


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to uint8 with the range of all its values: DynamicQuantizeLinear."""
    return fake_quantize(x, choose_qparams(x, _UINT8), _UINT8) if x.numel() else x


@torch.library.custom_op("qkit_onnx::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    w_scale: Tensor,
    r_scale: Tensor,
    bias: Tensor,
    h: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` ``[T, B, I]`` to ``y`` ``[T, D, B, H]``, and the last ``h`` and ``c`` ``[D, B, H]``.

    ``w`` int8 ``[D, I, 4H]`` and ``r`` int8 ``[D, H, 4H]`` with scales ``[D, 4H]``, gates in the
    order input, output, forget, cell; ``bias`` ``[D, 8H]`` of both.
    """
    made = []
    for d in range(w.shape[0]):
        steps = x if d == 0 else x.flip(0)
        given, own = bias[d].chunk(2)
        gates = rounded(steps) @ (w[d] * w_scale[d]) + given + own
        hidden, cell, outputs = h[d], c[d], []
        for step in gates:
            i, o, f, g = (step + rounded(hidden) @ (r[d] * r_scale[d])).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        y = torch.stack(outputs)
        made.append((y if d == 0 else y.flip(0), hidden, cell))
    ys, hs, cs = zip(*made, strict=True)
    return torch.stack(ys, 1), torch.stack(hs), torch.stack(cs)


@dynamic_lstm.register_fake
def _(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    w_scale: Tensor,
    r_scale: Tensor,
    bias: Tensor,
    h: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((x.shape[0], w.shape[0], x.shape[1], r.shape[1]))
    return y, torch.empty_like(h), torch.empty_like(c)


def _for_onnx(matrix: Tensor) -> Tensor:
    """Rows of the gates input, forget, cell, output in the order of ONNX."""
    i, f, g, o = matrix.chunk(4)
    return torch.cat([i, o, f, g])


def _stored(matrix: Tensor, spec: QSpec, name: str) -> tuple[Tensor, Tensor]:
    """Codes ``[K, 4H]`` and scales ``[4H]`` of a weight ``[4H, K]``."""
    ordered = _for_onnx(matrix)
    q = quantize(ordered, choose_qparams(ordered, spec, name=name), spec)
    return q.codes.T, q.qparams.scale.float().reshape(-1).expand(len(ordered))


def replace_lstm(module: fx.GraphModule, node: fx.Node, spec: QSpec) -> None:
    """Put ``dynamic_lstm`` for each layer in the place of ``node``, a call of ``aten.lstm``."""
    args: Any = node.args
    x, state, names, biased, layers, _, _, both, batch_first = args
    graph, aten = module.graph, torch.ops.aten
    parameters = [attribute(module, each) for each in names]
    directions, step = (2 if both else 1), (4 if biased else 2)

    def call(operator: Any, *args: Any) -> fx.Node:
        return graph.call_function(operator, args)

    def constant(name: str, value: Tensor) -> fx.Node:
        full = f"_{node.name}_{name}"
        module.register_buffer(full, value.contiguous())
        return graph.get_attr(full)

    with graph.inserting_before(node):
        y = call(aten.transpose.int, x, 0, 1) if batch_first else x
        ends: list[tuple[fx.Node, fx.Node]] = []
        for layer in range(layers):
            first = layer * directions
            mine = [
                parameters[(first + d) * step : (first + d + 1) * step] for d in range(directions)
            ]
            w, r = (
                [_stored(each[k], spec, str(names[first * step + k].target)) for each in mine]
                for k in (0, 1)
            )
            size = mine[0][1].shape[1]
            zero = torch.zeros(4 * size)
            biases = [
                torch.cat([_for_onnx(b) for b in (each[2:] if biased else [zero, zero])])
                for each in mine
            ]
            given = [
                constant(f"w{layer}", torch.stack([codes for codes, _ in w])),
                constant(f"r{layer}", torch.stack([codes for codes, _ in r])),
                constant(f"w_scale{layer}", torch.stack([scale for _, scale in w])),
                constant(f"r_scale{layer}", torch.stack([scale for _, scale in r])),
                constant(f"bias{layer}", torch.stack(biases)),
                *(call(aten.slice.Tensor, s, 0, first, first + directions) for s in state),
            ]
            done = call(torch.ops.qkit_onnx.dynamic_lstm.default, y, *given)
            out, h, c = (call(getitem, done, k) for k in range(3))
            y = call(aten.flatten.using_ints, call(aten.transpose.int, out, 1, 2), 2, 3)
            ends.append((h, c))
        y = call(aten.transpose.int, y, 0, 1) if batch_first else y
        results: Any = [y, *(call(aten.cat.default, [each[k] for each in ends]) for k in (0, 1))]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
