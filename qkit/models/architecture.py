"""The architecture of a Hugging Face folder without its weights: its class, layers and ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qkit.errors import QkitError
from qkit.models.factory import offline_transformers, skeleton, spread, ties_of
from qkit.models.folder import check_local, read_config
from qkit.report import package_version


@dataclass(frozen=True)
class Architecture:
    """How a model is rebuilt (see :func:`qkit.models.skeleton`), the class names of its modules,
    and the names that stand for one tensor. Of an unknown one, ``reason`` says why."""

    builder: dict[str, str] | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    ties: list[list[str]] = field(default_factory=list)
    reason: str | None = None


def architecture_of(folder: Path, tensors: Mapping[str, Tensor]) -> Architecture:
    """That of the folder's ``config.json``, if transformers builds what ``tensors`` fit.

    It is built on the meta device. Nothing is raised: with other names or shapes, or without
    transformers, the folder is a state dict like any other.
    """
    config = read_config(folder) or {}
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        return Architecture(reason="its configuration names no class")
    if package_version("transformers") is None:
        return Architecture(reason="transformers is not installed (pip install 'qkit-torch[hf]')")
    builder = {"kind": "transformers", "class": names[0]}
    try:
        check_local(folder, config)
        with torch.device("meta"), offline_transformers():
            model = skeleton(builder, folder / "config.json")
            if tie := getattr(model, "tie_weights", None):
                tie()
    except QkitError as error:
        return Architecture(reason=error.problem)
    except Exception as error:  # whatever the configuration leads to
        return Architecture(reason=f"{names[0]} cannot be built: {type(error).__name__}")
    ties = ties_of(model)
    if misfit := _misfit(model, spread(tensors, ties)):
        return Architecture(reason=f"its tensors are not those of {names[0]} ({misfit})")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return Architecture(builder, kinds, ties)


def _misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is missing, misshapen or unexpected."""
    wanted = model.state_dict(keep_vars=True)
    for name, tensor in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != tensor.shape:
            return f"{name} has another shape"
    return next((f"{name} is unexpected" for name in tensors if name not in wanted), None)
