"""Programs as ONNX files: opset 21, integer weights as integers, nothing about this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qkit.errors import RequestError, first_line
from qkit.graph import quiet
from qkit.targets.onnx import nbits, operators
from qkit.targets.staging import as_output_error

OPSET = 21
# What protobuf can hold in one file.
MAX_BYTES = (1 << 31) - 1


def write(program: torch.export.ExportedProgram, path: Path, shapes: Any = None) -> None:
    """Write ``program`` to ``path``; ``shapes`` name its dynamic dimensions.

    The initializers are those of the program: int8 codes stay int8. The exporter's notes (stack
    traces with the paths of this machine) are left out, and the file passes the ONNX checker.

    Raises :class:`~qkit.errors.RequestError` where ONNX has no form for an operator, or the file
    would be larger than 2 GB.
    """
    import onnx

    try:
        with quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=operators.translations() | nbits.translations(),
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
    except Exception as error:  # the exporter raises many kinds, with long texts
        raise RequestError(
            f"torch.onnx cannot write the model: {_reason(error)}",
            fix="another --target, or --ignore the layer",
        ) from error
    if model.ByteSize() > MAX_BYTES:
        raise RequestError("an ONNX file holds at most 2 GB", got=f"{model.ByteSize()} bytes")
    _forget(model)
    onnx.checker.check_model(model, full_check=True)
    with as_output_error(path):
        path.write_bytes(model.SerializeToString(deterministic=True))


def _reason(error: Exception) -> str:
    """The innermost message of the exporter's chain."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)


def _forget(model: Any) -> None:
    """Remove what says where and when the model was made."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs = [model.graph, *(f for f in model.functions)]
    while graphs:
        graph = graphs.pop()
        parts = [graph, *graph.node, *graph.value_info]
        if hasattr(graph, "initializer"):
            parts += [*graph.initializer, *graph.input, *graph.output]
        for part in parts:
            part.doc_string = ""
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
