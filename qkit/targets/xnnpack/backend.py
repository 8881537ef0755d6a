"""The target ``xnnpack``: see :class:`qkit.targets.backend.Backend`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from qkit.errors import RequestError, UsageError
from qkit.graph import DIALECTS, Captured, Dialect
from qkit.report import package_version
from qkit.spec import PerTensor, Scheme
from qkit.targets import require_packages
from qkit.targets.backend import Audit, Converted, Session, refuse_others
from qkit.targets.xnnpack import runtime
from qkit.targets.xnnpack.write import bounds_of, per_row, program_of, write

EXTRA = "xnnpack"
PACKAGES = ("torchao", "executorch")


class XnnpackBackend:
    """One file, ``model.pte``, run by ExecuTorch with its XNNPACK delegate on the CPU.

    The option ``bounds`` is the largest size of each dimension that varies, by name.
    """

    name = "xnnpack"
    file = "model.pte"

    def dialect(self, options: Mapping[str, Any]) -> Dialect:
        """That of XNNPACK."""
        return DIALECTS["xnnpack"]

    def check(self, scheme: Scheme | None, options: Mapping[str, Any]) -> None:
        """Packages and options; :class:`~qkit.errors.MissingExtraError` names the pip command."""
        refuse_others(self.name, options)
        for name, bound in (options.get("bounds") or {}).items():
            if bound < 1:
                raise UsageError(f"the bound of {name!r} is not a size", got=bound)
        require_packages(PACKAGES, EXTRA, "--target xnnpack")
        if scheme is None or scheme.input is None:
            return
        if scheme.input.when == "dynamic" and scheme.weight.granularity == PerTensor():
            raise RequestError(
                "XNNPACK has one scale for all weights of a layer with static ranges only",
                got=scheme.name,
                fix="--scheme int8-dynamic, with a scale per channel, or int8-static",
            )

    def specialize(self, converted: Converted) -> fx.GraphModule:
        """With ranges of rows where they are taken at each call."""
        bounds_of(converted.captured, _bounds(converted.options))
        return per_row(converted.module)

    def export_float(self, captured: Captured, path: Path) -> None:
        """Write the float model."""
        write(program_of(captured.module(), captured, {}), path)

    def export(self, converted: Converted, path: Path) -> None:
        """Write the quantized model."""
        captured = converted.captured
        write(program_of(converted.module, captured, _bounds(converted.options)), path)

    def weight_only(self, qmodel: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """Never: :func:`qkit.targets.check` refuses such schemes."""
        raise RequestError("XNNPACK has no kernel for weights without activations")

    def load(self, path: Path, threads: int) -> Session:
        """The file in ExecuTorch's runtime."""
        return runtime.load(path, threads)

    def audit(self, path: Path, converted: Converted) -> Audit:
        """The kernels in the file, and the sizes and the order of its inputs."""
        found, captured = runtime.audit(path, converted.expected), converted.captured
        told = [
            f"{name} 1 to {n}"
            for name, n in bounds_of(captured, _bounds(converted.options)).items()
        ]
        remarks = [f"sizes that vary: {', '.join(told)} (--bound)"] if told else []
        if captured.kwargs:
            order = [f"input {i}" for i in range(len(captured.args))] + sorted(captured.kwargs)
            remarks.append(f"the inputs of {self.file} are, in this order: {', '.join(order)}")
        return replace(found, remarks=(*found.remarks, *remarks))

    def probe(self, path: Path, dialect: str | None, trusted: bool = False) -> dict[str, Any]:
        """The kernels of the file."""
        return {"kernels": runtime.probe(path)}

    def runtime(self) -> str:
        """The installed version."""
        return f"executorch {package_version('executorch')}"


def _bounds(options: Mapping[str, Any]) -> dict[str, int]:
    return dict(options.get("bounds") or {})


BACKEND = XnnpackBackend()
