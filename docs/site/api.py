"""The list behind the reference of the API: what is documented, in which order."""

from __future__ import annotations

import importlib
import inspect

import qkit
from qkit import errors

# Below the public names: what the pages of this documentation use.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Runtimes": (
        "qkit.flows.lower.lower",
        "qkit.flows.pt2e.convert",
        "qkit.flows.qat.Qat",
        "qkit.targets.backend.Backend",
    ),
    "Training and distillation": (
        "qkit.flows.train.train",
        "qkit.flows.train.TrainOptions",
        "qkit.flows.train.labelled",
        "qkit.flows.distill.distill",
        "qkit.flows.distill.Teaching",
    ),
    "Schemes": tuple(
        f"qkit.spec.{name}"
        for name in (
            *("QSpec", "Int", "Float", "Codebook"),
            *("PerTensor", "PerChannel", "PerGroup", "PerToken", "PerBlock"),
        )
    ),
    "Numerics": tuple(
        f"qkit.numerics.{name}"
        for name in (
            *("choose_qparams", "quantize", "dequantize", "fake_quantize", "cast", "auto"),
            *("Observer", "QParams", "QTensor"),
        )
    ),
    "Packing": (
        "qkit.packing.pack",
        "qkit.packing.unpack",
        "qkit.packing.entropy.encode",
        "qkit.packing.entropy.decode",
    ),
    "Pruning": ("qkit.pruning.masks.Masks", "qkit.pruning.masks.movement"),
    "Errors": tuple(
        f"qkit.errors.{name}"
        for name, value in vars(errors).items()
        if isinstance(value, type) and value is not errors.QkitError
    ),
}


def directive(path: str) -> str:
    """The directive that documents the object called ``path``."""
    module, name = path.rsplit(".", 1)
    value = getattr(importlib.import_module(module), name)
    if not inspect.isclass(value):
        return f".. autofunction:: {path}\n"
    if issubclass(value, BaseException):
        return f".. autoexception:: {path}\n"
    return f".. autoclass:: {path}\n   :members:\n"


def listing() -> str:
    """The page's text: the public names, functions first, then the sections."""
    public = [f"qkit.{name}" for name in qkit.__all__]
    kinds = {path: directive(path).startswith(".. autofunction") for path in public}
    groups = {
        "Functions": tuple(path for path, function in kinds.items() if function),
        "Types": tuple(path for path, function in kinds.items() if not function),
    } | SECTIONS
    parts = []
    for title, paths in groups.items():
        body = "\n".join(map(directive, paths))
        parts.append(f"## {title}\n\n```{{eval-rst}}\n{body}```\n")
    return "\n".join(parts)
