"""ONNX Runtime's own operators (``com.microsoft``), recorded while torch.onnx writes a graph."""

from __future__ import annotations

from typing import Any


def microsoft(
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
