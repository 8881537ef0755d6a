"""The target ``inductor``: see :class:`qkit.targets.backend.Backend`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qkit.errors import RequestError, UnsafeCodeError
from qkit.graph import DIALECTS, Captured, Dialect
from qkit.spec import PerTensor, Scheme
from qkit.targets import require_packages
from qkit.targets.backend import Audit, Converted, Session, refuse_others
from qkit.targets.inductor import runtime
from qkit.targets.inductor.rewrite import rewritten
from qkit.targets.inductor.write import require_compiler, write
from qkit.targets.trial import apart

EXTRA = "pt2e"


class InductorBackend:
    """One file, ``model.pt2``: native code with oneDNN's integer kernels, which torch loads."""

    name = "inductor"
    file = "model.pt2"

    def dialect(self, options: Mapping[str, Any]) -> Dialect:
        """That of Inductor."""
        return DIALECTS["inductor"]

    def check(self, scheme: Scheme | None, options: Mapping[str, Any]) -> None:
        """Processor, packages, compiler and options."""
        refuse_others(self.name, options)
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise RequestError(
                "Inductor has integer kernels for x86 processors",
                got=platform.machine(),
                fix="--target xnnpack",
            )
        if scheme is None:
            return
        require_packages(["torchao"], EXTRA, "--target inductor")
        require_compiler()
        if scheme.weight.granularity == PerTensor():
            raise RequestError(
                "Inductor has integer kernels for weights with a scale per channel only",
                got=scheme.name,
                fix="--scheme int8-static or int8-dynamic",
            )

    def specialize(self, converted: Converted) -> fx.GraphModule:
        """With what its kernels are right on."""
        return rewritten(converted.module)

    def export_float(self, captured: Captured, path: Path) -> None:
        """Write the float model, compiled as the quantized one is."""
        write(captured.module(), captured, path)

    def export(self, converted: Converted, path: Path) -> None:
        """Write the quantized model."""
        write(converted.module, converted.captured, path)

    def weight_only(self, qmodel: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """Never: :func:`qkit.targets.check` refuses such schemes."""
        raise RequestError("Inductor has no kernel for weights without activations")

    def load(self, path: Path, threads: int) -> Session:
        """The package in this process."""
        return runtime.load(path, threads)

    def audit(self, path: Path, converted: Converted) -> Audit:
        """The kernels that the package calls."""
        remark = f"{self.file} is native code, compiled for {runtime.isa_of(path)}"
        return replace(runtime.audit(path, converted.expected), remarks=(remark,))

    def probe(self, path: Path, dialect: str | None, trusted: bool = False) -> dict[str, Any]:
        """The kernels of the file."""
        runtime.read(path)  # of a damaged file nothing is run
        if not trusted:
            raise UnsafeCodeError(str(path))
        apart(self.name, path)
        found = runtime.audit(path, 0)
        return {"kernels": found.integer | found.floating}

    def runtime(self) -> str:
        """The installed version."""
        return f"torch {torch.__version__}, AOTInductor"


BACKEND = InductorBackend()
