"""What Inductor's integer kernels go wrong on (torch 2.13), in a form that they are right on.

Images of one channel. With a batch that varies, Inductor takes the output of their convolution for
contiguous (``_prepare_convolution_fusion_create`` in ``torch/_inductor/mkldnn_ir.py``), while the
integer kernel of oneDNN gives channels last: the values are right, and are read in another order. A
second channel of zeros, and weights of zero for it, change no sum.

Rows that are not one behind the other (of a transposed tensor, of an LSTM's outputs). Their linear
layer becomes a batched product, whose pattern fails on sizes that are symbols
(``_is_valid_dequant_linear_pattern`` in ``torch/_inductor/fx_passes/quantization.py``:
"torch.Size() takes an iterable of 'int'"). So they are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad

from qkit.graph import clean
from qkit.graph.kinds import attribute, kind_of

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
