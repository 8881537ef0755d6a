"""Dialects: how a runtime wants quantization to be written into the graph around its kernels.

A scheme says how a layer is quantized, and means the same everywhere up to what no runtime can
choose freely: whether activation codes are signed, whether they have a zero point, and whether the
output of a layer is rounded as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from qkit.spec import Int, PerTensor, QSpec, Scheme

_CONVS = frozenset({"Conv1d", "Conv2d"})
_LINEAR = frozenset({"Linear"})
_LAYERS = _CONVS | _LINEAR


@dataclass(frozen=True)
class Dialect:
    """How a runtime's integer kernels want the graph.

    ``acts`` is the format of activations, with a zero point unless it is narrow. With ``outputs``
    every integer operator stands between quantized values (dequantize, operator, quantize), else
    only the inputs of layers and sums are quantized. With ``bias`` the bias of a layer is int32
    with the product of the scales of input and weight, which an integer kernel adds as it is, else
    float. ``kinds`` are the operators (:mod:`qkit.graph.kinds`) that have integer kernels, or look
    up codes (``Embedding``), ``dynamic`` those of the first that also have one for ranges taken at
    each call. With ``outputs``, the layers ``always`` are rounded behind, because their kernels
    take codes and give codes. The kernels of the layers ``summing`` add to codes, so that one term
    of a sum is not rounded. Ranges that are taken at each call are those of all rows, or
    ``by_row`` of each.
    """

    name: str
    acts: Int
    outputs: bool
    bias: bool
    kinds: frozenset[str]
    dynamic: frozenset[str]
    always: frozenset[str] = _CONVS
    summing: frozenset[str] = frozenset()
    by_row: bool = False

    def input_spec(self, when: str) -> QSpec:
        """How activations are quantized: per tensor, ``when`` static or dynamic."""
        return QSpec(self.acts, PerTensor(), self.acts.narrow, when)

    def describe(self, scheme: Scheme) -> str:
        """The long form of ``scheme`` as this dialect writes it."""
        text = f"{scheme.name} for {self.name}: weights {scheme.weight.describe()}; activations "
        if scheme.input is None:
            return text + "not quantized"
        outputs = ", outputs too" if self.outputs and scheme.input.when == "static" else ""
        spec = self.input_spec(scheme.input.when)
        return text + f"{spec.describe()}, {scheme.input.when}{outputs}"


_MOVES = frozenset({"MaxPool2d", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice",
                    "Dropout", "ReLU", "Hardtanh"})  # fmt: skip
_ALL = _LAYERS | _MOVES | {"Add", "Concat", "AvgPool2d", "AdaptiveAvgPool2d", "Mean", "Embedding"}

UINT8, INT8, NARROW = Int(8, signed=False), Int(8), Int(8, narrow=True)

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        # ONNX Runtime fuses dequantize, operator, quantize; on x86 its kernels take uint8.
        Dialect("onnx", UINT8, True, True, _ALL | {"LSTM", "Upsample"}, _LINEAR | {"LSTM"}),
        # TensorRT's explicit quantization has no zero points, and its biases are floats.
        Dialect("tensorrt", NARROW, False, False, _LAYERS | _MOVES | {"Add"}, frozenset()),
        # oneDNN, through Inductor's fusions, which look for uint8 inputs. What stands between a
        # layer and the rounding of its output (hardswish, silu, gelu) is computed in its kernel.
        # Of Conv1d it takes the sizes for others than they are (torch 2.13).
        Dialect(
            "inductor",
            UINT8,
            True,
            False,
            _ALL - {"Conv1d"},
            _LINEAR,
            frozenset(),
            frozenset({"Conv2d"}),
        ),
        Dialect(
            "xnnpack",
            INT8,
            True,
            False,
            _ALL - {"AvgPool2d"} | {"Mul"},
            _LINEAR,
            _LAYERS,
            by_row=True,
        ),
    )
}
