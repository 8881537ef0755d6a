"""ONNX Runtime: loading a file, running it, and counting the kernels of its optimized graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit.errors import InputError, VerificationError, first_line
from qkit.targets.backend import Audit, Session

PROVIDERS = ["CPUExecutionProvider"]

# Kernels that multiply integer weights, and what they are called where they stayed in float.
INTEGER = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "ConvInteger",
        "MatMulNBits",
        "QAttention",
    }
)
FLOATING = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM"})
# Other kernels on codes.
MOVING = ("QLinear", "Nhwc")


def open_session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """An ``InferenceSession``; :class:`~qkit.errors.InputError` if the file is refused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # it warns that the optimized file is for this machine
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as error:  # its own kinds, by their C++ names
        raise InputError(
            f"ONNX Runtime refuses the file: {first_line(error)}", where=str(path)
        ) from error


def load(path: Path, threads: int) -> Session:
    """The file as a function of tensors."""
    session = open_session(path, threads)
    names = [each.name for each in session.get_inputs()]

    def call(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
        free = iter([name for name in names if name not in kwargs])
        given = dict(zip(free, args, strict=False)) | {
            name: tensor for name, tensor in kwargs.items() if name in names
        }
        if missing := [name for name in names if name not in given]:
            raise InputError(
                f"the graph has other inputs: nothing is given for {', '.join(missing)}",
                where=str(path),
                got=", ".join([*(f"input {i}" for i in range(len(args))), *kwargs]),
                wanted=", ".join(names),
            )
        feed = {name: tensor.detach().numpy() for name, tensor in given.items()}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feed)]
        except Exception as error:
            raise InputError(
                f"ONNX Runtime fails on the inputs: {first_line(error)}", where=str(path)
            ) from error

    return call


def audit(path: Path, expected: int) -> Audit:
    """What ONNX Runtime makes of the file on this machine, with all its optimizations."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="qkit-audit-") as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(path, 1, optimized)
        graph = onnx.load(optimized).graph
    counts = Counter(node.op_type for node in graph.node)
    made = {name for node in graph.node for name in node.output}
    outputs = {each.name for each in graph.output}
    between = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in made
        and node.output[0] not in outputs
    ]
    integer = {
        name: n for name, n in sorted(counts.items()) if name in INTEGER or name.startswith(MOVING)
    }
    return Audit(
        integer=integer,
        floating={name: n for name, n in sorted(counts.items()) if name in FLOATING},
        ran=sum(n for name, n in counts.items() if name in INTEGER),
        expected=expected,
        left=len(between),
    )


_MADE_UP: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
}
_MADE_UP |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
_MADE_UP |= {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}


def probe(path: Path) -> dict[str, int]:
    """The kernels of the file, which runs on made-up inputs: ones, every free dimension 2.

    Raises :class:`~qkit.errors.InputError` if it cannot be loaded or run, and
    :class:`~qkit.errors.VerificationError` if an output is not finite.
    """
    session = open_session(path, 1)
    feed = {}
    for given in session.get_inputs():
        if given.type not in _MADE_UP:
            raise InputError("an input that qkit cannot make up", where=str(path), got=given.type)
        shape = [size if isinstance(size, int) else 2 for size in given.shape]
        feed[given.name] = np.ones(shape, _MADE_UP[given.type])
    try:
        outputs = session.run(None, feed)
    except Exception as error:
        raise InputError(
            f"ONNX Runtime fails on made-up inputs: {first_line(error)}",
            where=str(path),
            got=", ".join(f"{name} {array.shape}" for name, array in feed.items()),
        ) from error
    bad = [each for each in outputs if each.dtype.kind == "f" and not np.isfinite(each).all()]
    if bad:
        raise VerificationError("an output is not finite on inputs of ones", where=str(path))
    found = audit(path, 0)
    return found.integer | found.floating
