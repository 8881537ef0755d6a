"""What Inductor's integer kernels go wrong on (torch 2.13), in a form that they are right on.

Images of one channel. With a batch that varies, Inductor takes the output of their convolution for
contiguous (``_prepare_convolution_fusion_create`` in ``torch/_inductor/mkldnn_ir.py``), while the
integer kernel of oneDNN gives channels last: the values are right, and are read in another order. A
second channel of zeros, and weights of zero for it, change no sum.

Rows that are not one behind the other (of a transposed tensor, of an LSTM's outputs). Their linear
layer becomes a batched product, whose pattern fails on sizes that are symbols
(``_is_valid_dequant_linear_pattern`` in ``torch/_inductor/fx_passes/quantization.py``:
"torch.Size() takes an iterable of 'int'"). So they are copied.

Ranges that are taken at each call. Inductor's own form of ``choose_qparams``
(``choose_qparams_tensor`` in ``torch/_inductor/decomposition.py``) does not widen them to contain
zero, as the operator does, so that values that are all positive, such as the means of relus before
a classifier, are clipped. Its operand is replaced by the ends of the widened range, of which both
make the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad

from qkit.graph import clean
from qkit.graph.kinds import attribute, decomposed, kind_of

_CHOOSE = "choose_qparams"
_PAD, _CONTIGUOUS = torch.ops.aten.constant_pad_nd.default, torch.ops.aten.contiguous.default


def rewritten(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, a converted program, changed in place."""
    for node in list(module.graph.nodes):
        kind = kind_of(node)
        if kind is None or kind.role != "weighted":
            continue
        x, weight = node.args[:2]
        codes: Any = weight.args[0] if weight.args else None
        quantized: Any = x.args[0] if x.args else None
        if not (isinstance(quantized, fx.Node) and codes is not None and codes.op == "get_attr"):
            continue
        if kind.name == "Linear":
            _copy_rows(module.graph, quantized)
        elif attribute(module, codes).shape[1] == 1 and node.args[6:7] in ((), (1,)):
            _add_channel(module, node)
    for node in list(module.graph.nodes):
        if decomposed(node) == _CHOOSE:
            _contain_zero(module.graph, node)
    return clean(module)


def _copy_rows(graph: fx.Graph, quantized: fx.Node) -> None:
    """Quantize rows that lie one behind the other; where they do, the copy is none."""
    x: Any = quantized.args[0]
    value = x.meta.get("val")
    if value is None or value.dim() < 3 or x.target is _CONTIGUOUS:
        return
    with graph.inserting_after(x):
        copied = graph.call_function(_CONTIGUOUS, (x,))
    copied.meta["val"] = value.contiguous()
    quantized.replace_input_with(x, copied)
    for params in quantized.all_input_nodes:  # of a range that is taken at each call
        for chosen in params.all_input_nodes if params is not copied else ():
            chosen.replace_input_with(x, copied)


def _contain_zero(graph: fx.Graph, choose: fx.Node) -> None:
    """Give ``choose`` the ends of the range of its operand, widened to contain zero."""
    x, ops = choose.args[0], torch.ops.aten
    with graph.inserting_before(choose):
        low, high = (graph.call_function(f.default, (x,)) for f in (ops.amin, ops.amax))
        low = graph.call_function(ops.clamp_max.default, (low, 0.0))
        high = graph.call_function(ops.clamp_min.default, (high, 0.0))
        ends = graph.call_function(ops.stack.default, ([low, high],))
    choose.args = (ends, *choose.args[1:])


def _add_channel(module: fx.GraphModule, node: fx.Node) -> None:
    """Make the quantized convolution ``node`` one of two channels."""
    x, weight, graph = *node.args[:2], module.graph
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    codes: Any = weight.args[0]
    values = attribute(module, codes)
    name = f"{str(codes.target).replace('.', '_')}_of_two_channels"
    around = [*[0, 0] * (values.dim() - 2), 0, 1]
    module.register_buffer(name, pad(values, around))
    quantized: Any = x.args[0]
    with graph.inserting_before(node):
        wide = graph.call_function(_PAD, (quantized.args[0], around))
        again = graph.call_function(quantized.target, (wide, *quantized.args[1:]))
        node.update_arg(0, graph.call_function(x.target, (again, *x.args[1:])))  # type: ignore[arg-type]
        both = graph.call_function(weight.target, (graph.get_attr(name), *weight.args[1:]))  # type: ignore[arg-type]
        node.update_arg(1, both)
