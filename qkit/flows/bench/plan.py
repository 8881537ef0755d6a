"""What is measured: how each contender is run, found out without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qkit.errors import InputError, UnsafeCodeError, UsageError, nearest
from qkit.flows.source import pruned_artifact
from qkit.flows.verify import SUFFIXES
from qkit.models import sniff
from qkit.models.sniff import FOLDER, weight_files
from qkit.targets import COMPRESSED, LOWERED, QUANTO, TARGETS
from qkit.targets.artifact import CONFIG, Artifact, is_artifact, read_artifact
from qkit.targets.backend import backend
from qkit.targets.inductor.runtime import is_package
from qkit.targets.quanto import map_of

Models = Sequence[nn.Module | str | Path] | Mapping[str, nn.Module | str | Path]

# How a contender is run, besides by the targets of the PT2E flow.
MODEL, QKIT, CODED = "model", "qkit", "coded"
# Where ONNX files keep weights that are too large for them.
EXTERNAL = (".data", "_data")


@dataclass(frozen=True)
class Plan:
    """One contender: ``file`` is what its runtime loads, ``weights`` the files that hold its
    weights. ``kind`` is a target of the PT2E flow, ``model`` (whatever :func:`qkit.models.load`
    reads, in torch), ``qkit`` or ``coded`` (artifacts, by :func:`qkit.load`), or the format of a
    folder for another tool. ``trusted`` says that we pickled it ourselves."""

    name: str
    kind: str
    path: Path
    file: Path
    weights: tuple[Path, ...]
    scheme: str | None = None
    trusted: bool = False

    @property
    def size_bytes(self) -> int:
        """The bytes of its weights on disk."""
        return sum(path.stat().st_size for path in self.weights)


def plans(models: Models, folder: Path, *, trust_code: bool) -> list[Plan]:
    """How each of ``models`` is run; modules are saved in ``folder`` first.

    Raises :class:`~qkit.errors.InputError` for what is missing or no model,
    :class:`~qkit.errors.UnsafeCodeError` for native code that is not trusted, and
    :class:`~qkit.errors.UsageError` if there is nothing to measure.
    """
    if not models:
        raise UsageError("nothing to measure", wanted="models, artifacts or files of runtimes")
    found: list[Plan] = []
    for name, model in _named(models).items():
        if isinstance(model, nn.Module):
            path = folder / f"module-{len(found)}.pt"
            torch.save(model, path)
            plan = Plan(name, MODEL, path, path, (path,), trusted=True)
        else:
            plan = replace(_plan(Path(model), trust_code), name=name)
        found.append(plan)
    return found


def _named(models: Models) -> dict[str, nn.Module | str | Path]:
    """``models`` by name: files by the last part of their path, if that is theirs alone."""
    if isinstance(models, Mapping):
        return dict(models)
    shown = [type(m).__name__ if isinstance(m, nn.Module) else Path(m).name or "." for m in models]
    full = [shown[i] if isinstance(m, nn.Module) else str(m) for i, m in enumerate(models)]
    found: dict[str, nn.Module | str | Path] = {}
    for index, model in enumerate(models):
        name = shown[index] if shown.count(shown[index]) == 1 else full[index]
        if full.count(full[index]) > 1:
            name = f"{name} #{full[: index + 1].count(full[index])}"
        found[name] = model
    return found


def _plan(path: Path, trust_code: bool) -> Plan:
    if not path.exists():
        raise InputError("no such file or folder", where=str(path))
    path = path.absolute()
    target = SUFFIXES.get(path.suffix) if path.is_file() else None
    if target == "inductor" and not is_package(path):
        target = None  # a torch.export program
    if target is not None:
        return _runtime(path, target, path, trust_code)
    if is_artifact(path):
        return _artifact(read_artifact(path), trust_code)
    if map_of(path) is not None:
        return Plan("", QUANTO, path, path, tuple(weight_files(path)))
    if path.is_dir() and _is_compressed(path):
        return Plan("", COMPRESSED, path, path, tuple(weight_files(path)))
    folder = sniff(path) == FOLDER
    return Plan("", MODEL, path, path, tuple(weight_files(path)) if folder else (path,))


def _is_compressed(folder: Path) -> bool:
    """Whether the configuration of a Hugging Face folder names the format compressed-tensors."""
    config = folder / CONFIG
    return config.is_file() and f'"{COMPRESSED}"' in config.read_text(encoding="utf-8")


def _runtime(path: Path, target: str, file: Path, trust_code: bool) -> Plan:
    if TARGETS[target].native and not trust_code:
        raise UnsafeCodeError(str(path))
    beside = [file.with_name(file.name + end) for end in EXTERNAL]
    return Plan("", target, path, file, (file, *(p for p in beside if p.is_file())))


def _artifact(artifact: Artifact, trust_code: bool) -> Plan:
    path, scheme = artifact.path, artifact.meta.get("scheme")
    scheme = scheme if isinstance(scheme, str) else None
    if artifact.target in LOWERED:
        file = path / backend(artifact.target).file
        return replace(_runtime(path, artifact.target, file, trust_code), scheme=scheme)
    if artifact.is_coded:
        return Plan("", CODED, path, path, (path,), scheme)
    kind = artifact.target if artifact.target in (COMPRESSED, QUANTO) else QKIT
    weights = tuple(artifact.weights)
    if pruned_artifact(path) is not None:
        scheme = None
    return Plan("", kind, path, path, weights, scheme)


def baseline_of(plans: Sequence[Plan], name: str | None) -> str:
    """The name of the contender that the others are held against: the first one, if none is said.

    Raises :class:`~qkit.errors.UsageError` for a name that none has.
    """
    names = [plan.name for plan in plans]
    if name is None:
        return names[0]
    if name not in names:
        raise UsageError("no contender of this name", got=name, wanted=nearest(name, names))
    return name
