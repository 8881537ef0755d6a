"""The target ``onnx``: see :class:`qkit.targets.backend.Backend`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from qkit.errors import UsageError
from qkit.graph import DIALECTS, Captured, Dialect, export
from qkit.report import package_version
from qkit.spec import Scheme
from qkit.targets import require_packages
from qkit.targets.backend import Audit, Converted, Session, refuse_others
from qkit.targets.onnx import runtime
from qkit.targets.onnx.nbits import with_nbits
from qkit.targets.onnx.operators import with_operators
from qkit.targets.onnx.write import write

EXTRA = "onnx"
DIALECT_NAMES = ("onnx", "tensorrt")
# ONNX Runtime's accuracy levels of MatMulNBits: 0 is its default, 4 rounds activations to int8.
LEVELS = (0, 1, 2, 3, 4)


class OnnxBackend:
    """One file, ``model.onnx``, run by ONNX Runtime on the CPU.

    Options: ``dialect`` (``onnx``, or ``tensorrt`` for TensorRT's explicit quantization) and
    ``accuracy_level`` of MatMulNBits.
    """

    name = "onnx"
    file = "model.onnx"

    def dialect(self, options: Mapping[str, Any]) -> Dialect:
        """That of ONNX Runtime, or TensorRT's."""
        return DIALECTS[options.get("dialect") or "onnx"]

    def check(self, scheme: Scheme | None, options: Mapping[str, Any]) -> None:
        """Packages and options; :class:`~qkit.errors.MissingExtraError` names the pip command."""
        refuse_others(self.name, options)
        dialect = options.get("dialect") or "onnx"
        if dialect not in DIALECT_NAMES:
            raise UsageError("unknown dialect", got=dialect, wanted=", ".join(DIALECT_NAMES))
        if options.get("accuracy_level", 0) not in LEVELS:
            raise UsageError("unknown accuracy level", got=options["accuracy_level"], wanted=LEVELS)
        packages = ["onnx", "onnxruntime"]
        if scheme is not None:
            packages += ["onnxscript"] if scheme.weight_only else ["onnxscript", "torchao"]
        require_packages(packages, EXTRA, "--target onnx")

    def specialize(self, converted: Converted) -> fx.GraphModule:
        """With what ONNX Runtime fuses, and LSTM layers that it has."""
        schemes = {site.node.name: site.scheme for site in converted.chosen if site.scheme}
        return with_operators(converted.module, schemes)

    def export_float(self, captured: Captured, path: Path) -> None:
        """Write the float model."""
        write(captured.program, path, captured.shapes)

    def export(self, converted: Converted, path: Path) -> None:
        """Write the quantized model."""
        given = converted.captured
        write(export(converted.module, given.args, given.kwargs, given.shapes), path, given.shapes)

    def weight_only(self, qmodel: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """Every layer as MatMulNBits, and every table as GatherBlockQuantized."""
        return with_nbits(qmodel, options.get("accuracy_level") or 0)

    def load(self, path: Path, threads: int) -> Session:
        """The file in a session of ONNX Runtime."""
        return runtime.load(path, threads)

    def audit(self, path: Path, converted: Converted) -> Audit:
        """The kernels that ONNX Runtime runs; for TensorRT, the rules that the file meets."""
        if self.dialect(converted.options).name != "tensorrt":
            return runtime.audit(path, converted.expected)
        from qkit.targets.onnx.tensorrt import require_rules

        return replace(runtime.audit(path, 0), remarks=(require_rules(path).told,))

    def probe(self, path: Path, dialect: str | None, trusted: bool = False) -> dict[str, Any]:
        """The kernels of the file, or the rules of TensorRT."""
        from qkit.targets.onnx import tensorrt

        if dialect == "tensorrt":
            return {"rules": tensorrt.require_rules(path).broken}
        tensorrt.read(path)
        return {"kernels": runtime.probe(path)}

    def runtime(self) -> str:
        """The installed version."""
        return f"onnxruntime {package_version('onnxruntime')}"


BACKEND = OnnxBackend()
