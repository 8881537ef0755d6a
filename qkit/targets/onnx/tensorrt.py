"""The rules of TensorRT's explicit quantization, as far as a file shows whether it meets them.

From "Working with Quantized Types" of NVIDIA's TensorRT documentation: QuantizeLinear and
DequantizeLinear in INT8 (or FP8, INT4), symmetric with zero point 0, constant scales that are
positive, activations per tensor, weights per tensor or per output channel, a Q/DQ pair on each
input of a layer. TensorRT itself is not run here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.errors import InputError, VerificationError, first_line

OPSETS = range(13, 25)
# Layers with a weight: the input that is the weight, and its output-channel axis.
_WEIGHTED = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, None), "MatMul": (1, None)}


@dataclass
class Rules:
    """What a file meets: for each rule, what breaks it (nothing: met). ``pairs`` are the Q/DQ
    operators that were looked at."""

    broken: dict[str, list[str]] = field(default_factory=dict)
    pairs: int = 0

    @property
    def met(self) -> bool:
        """Whether the file has quantization, and breaks no rule."""
        return self.pairs > 0 and not any(self.broken.values())

    @property
    def told(self) -> str:
        """A sentence for the report of a file that meets them."""
        return (
            f"meets TensorRT's rules for explicit quantization ({len(self.broken)} rules, "
            f"{self.pairs} Q/DQ operators); TensorRT itself was not run, and ONNX Runtime runs "
            "this dialect slowly"
        )


def read(path: Path) -> Any:
    """The model in ``path``; :class:`~qkit.errors.InputError` if it is not one."""
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except Exception as error:  # protobuf's and the checker's
        text = first_line(error, 200)
        raise InputError(f"not an ONNX model: {text}", where=str(path)) from error
    return model


def check_rules(path: Path) -> Rules:
    """Every rule, and the nodes of the file that break it."""
    from onnx import numpy_helper

    model = read(path)
    graph = model.graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    made = {name: node for node in graph.node for name in node.output}
    broken: dict[str, list[str]] = defaultdict(list)
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version not in OPSETS:
        broken["the opset is supported"].append(f"opset {version}")
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        _check_pair(node, constants, broken)
    for node in graph.node:
        if node.op_type in _WEIGHTED:
            _check_layer(node, made, constants, broken)
        if node.domain not in ("", "ai.onnx"):
            broken["only operators of ONNX itself"].append(f"{node.domain}.{node.op_type}")
    names = (
        "the opset is supported",
        "scales are positive constants",
        "codes are int8",
        "zero points are 0",
        "activations are quantized per tensor",
        "weights are quantized per output channel or tensor",
        "layers have a Q/DQ pair on their input and their weight",
        "only operators of ONNX itself",
    )
    return Rules({name: broken[name] for name in names}, len(pairs))


def _check_pair(node: Any, constants: dict[str, Any], broken: dict[str, list[str]]) -> None:
    scale = constants.get(node.input[1])
    if scale is None or not (scale > 0).all():
        broken["scales are positive constants"].append(node.name)
    zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is None and len(node.input) > 2 and node.input[2]:
        broken["zero points are 0"].append(f"{node.name}: computed")
    elif zero is not None and zero.any():
        broken["zero points are 0"].append(f"{node.name}: {zero.reshape(-1)[0]}")
    codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else zero
    kind = codes.dtype if codes is not None else zero.dtype if zero is not None else None
    if kind is None or str(kind) != "int8":
        broken["codes are int8"].append(f"{node.name}: {kind or 'uint8'}")
    activation = node.input[0] not in constants
    if activation and scale is not None and scale.size != 1:
        broken["activations are quantized per tensor"].append(node.name)


def _check_layer(
    node: Any, made: dict[str, Any], constants: dict[str, Any], broken: dict[str, list[str]]
) -> None:
    """A layer counts if its weight is quantized, or constant; of MatMul of activations, nothing."""
    index, axis = _WEIGHTED[node.op_type]
    source = made.get(node.input[index])
    transposed = False
    if source is not None and source.op_type == "Transpose":
        source, transposed = made.get(source.input[0]), True
    quantized = source is not None and source.op_type == "DequantizeLinear"
    x = made.get(node.input[0])
    x_quantized = x is not None and x.op_type == "DequantizeLinear"
    if quantized != x_quantized and (quantized or node.input[index] in constants):
        rule = "layers have a Q/DQ pair on their input and their weight"
        broken[rule].append(f"{node.name}: its {'input' if quantized else 'weight'} has none")
    if not quantized or source is None or source.input[0] not in constants:
        return
    scale = constants.get(source.input[1])
    if scale is None or scale.size == 1:
        return
    if axis is None:
        turned = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if turned != transposed else 1
    given = next((a.i for a in source.attribute if a.name == "axis"), 1)
    if given % constants[source.input[0]].ndim != axis:
        rule = "weights are quantized per output channel or tensor"
        broken[rule].append(f"{source.name}: axis {given}, not {axis}")


def require_rules(path: Path) -> Rules:
    """The rules, all met; :class:`~qkit.errors.VerificationError` if one is broken."""
    rules = check_rules(path)
    if not rules.met:
        wrong = {name: found[:3] for name, found in rules.broken.items() if found}
        raise VerificationError(
            "the file does not meet TensorRT's rules for explicit quantization",
            where=str(path),
            got="; ".join(f"{name}: no ({', '.join(found)})" for name, found in wrong.items())
            or "no quantization at all",
        )
    return rules
