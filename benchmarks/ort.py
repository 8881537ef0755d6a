"""ONNX Runtime's own quantization of a float file: what qkit's ONNX files are measured beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from qkit.graph import quiet


class Reader:
    """ONNX Runtime's view of calibration data: batches of inputs by name."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        arrays = [{name: t.numpy() for name, t in batch.items()} for batch in batches]
        self.batches: Iterator[dict[str, np.ndarray]] = iter(arrays)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize_static(file: Path, out: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Ranges by min-max, uint8 activations, int8 weights per channel: its advice for x86."""
    from onnxruntime import quantization as q

    ready = out.with_name(f"prepared-{out.name}")
    with quiet():
        q.quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        q.quantize_static(
            *(str(ready), str(out), Reader(batches)),
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
        )


def quantize_dynamic(file: Path, out: Path) -> None:
    """Ranges taken at each call, int8 weights per channel: its advice for transformers and RNNs."""
    from onnxruntime import quantization as q

    with quiet():
        q.quantize_dynamic(str(file), str(out), per_channel=True, weight_type=q.QuantType.QInt8)
