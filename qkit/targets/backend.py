"""What a runtime behind the PT2E flow provides: the Protocol, and what passes through it.

A backend is a module-level object that :func:`backend` imports when it is asked for. The flow calls
``check`` before anything is paid for, ``export`` once for the float program and once for the
converted one, ``load`` in a fresh process, and ``audit`` on the written file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, fx, nn

from qkit.errors import CoverageError, UsageError
from qkit.graph import Captured, Dialect, Site
from qkit.report import ActivationRow
from qkit.spec import Scheme
from qkit.targets import TARGETS

# A loaded artifact: positional and named tensors in, the flattened outputs out.
Session = Callable[[Sequence[Tensor], Mapping[str, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Converted:
    """What is lowered: the captured float model, the quantized ``module`` (of PT2E, with quantize
    and dequantize operators, or with weights that the target has operators for), and what became of
    each layer of PT2E. ``expected`` layers should run as integers; ``options`` are the target's,
    ``activations`` the ranges that ``observer`` learnt from ``samples``, where asked for;
    ``notes`` are remarks on how."""

    captured: Captured
    module: fx.GraphModule
    sites: tuple[Site, ...]
    expected: int
    options: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[ActivationRow, ...] = ()
    samples: int = 0
    observer: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> list[Site]:
        """The layers that are quantized."""
        return [site for site in self.sites if site.scheme is not None]


@dataclass(frozen=True)
class Audit:
    """What the runtime made of the artifact: its ``integer`` and ``floating`` kernels by name, how
    many layers ``ran`` as integers of the ``expected``, conversions ``left`` between kernels."""

    integer: dict[str, int]
    floating: dict[str, int]
    ran: int
    expected: int
    left: int = 0
    remarks: tuple[str, ...] = ()

    def require(self, where: str) -> None:
        """Raise :class:`~qkit.errors.CoverageError` if no integer kernel runs at all."""
        if self.expected and not self.ran:
            raise CoverageError(
                "the runtime runs no integer kernel: nothing is won",
                where=where,
                got=", ".join(f"{name} x{n}" for name, n in self.floating.items()) or "none",
                wanted=f"{self.expected} integer layers",
            )


class Backend(Protocol):
    """A runtime: how models are written for it, loaded by it, and what it runs."""

    name: str
    # The file in the artifact, such as model.onnx.
    file: str

    def dialect(self, options: Mapping[str, Any]) -> Dialect:
        """How the quantized graph is written."""

    def check(self, scheme: Scheme | None, options: Mapping[str, Any]) -> None:
        """Refuse what cannot be done here: a missing package or compiler, a scheme, an option.

        Without a ``scheme``, what it takes to run a file.
        """

    def specialize(self, converted: Converted) -> fx.GraphModule:
        """The converted program with operators of the runtime; they define what it computes."""

    def export_float(self, captured: Captured, path: Path) -> None:
        """Write the float program to ``path``, for comparison in the same runtime."""

    def export(self, converted: Converted, path: Path) -> None:
        """Write the converted program, which is specialized, to ``path``."""

    def load(self, path: Path, threads: int) -> Session:
        """Load a file; :class:`~qkit.errors.InputError` if the runtime refuses it."""

    def weight_only(self, qmodel: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """A copy of a model of qkit's layers, all of weight-only schemes, as the target has them.

        Each quantized layer is one call of an operator of the namespace ``qkit_NAME``, each table
        that is looked up one of ``qkit_NAME_tables``.
        """

    def audit(self, path: Path, converted: Converted) -> Audit:
        """Count what the runtime runs."""

    def probe(self, path: Path, dialect: str | None, trusted: bool = False) -> dict[str, Any]:
        """Load a file of anybody and run it on made-up inputs: its ``kernels``; or, with a
        ``dialect``, its ``rules`` (name -> what breaks it).

        Native code is run where it is ``trusted``, else
        :class:`~qkit.errors.UnsafeCodeError` is raised.
        """

    def runtime(self) -> str:
        """Its name and version, for reports."""


# The options that one target has: how they are given, and whose they are.
_OPTIONS = {
    "dialect": ("--dialect", "onnx"),
    "accuracy_level": ("--accuracy-level", "onnx"),
    "bounds": ("--bound", "xnnpack"),
}


def refuse_others(target: str, options: Mapping[str, Any]) -> None:
    """Raise :class:`~qkit.errors.UsageError` for an option of another target."""
    for name, (flag, owner) in _OPTIONS.items():
        if owner != target and options.get(name):
            raise UsageError(
                f"{flag} is for --target {owner}", got=f"{flag} {options[name]} for {target}"
            )


def backend(name: str) -> Backend:
    """The backend of the target ``name``, a row of :data:`qkit.targets.TARGETS`."""
    found: Backend = importlib.import_module(TARGETS[name].module).BACKEND
    return found
