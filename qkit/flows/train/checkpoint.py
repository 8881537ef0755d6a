"""Checkpoints of a training run: one safetensors file each, written whole, and no pickle.

Its tensors are ``model.NAME`` (every parameter and buffer) and ``optimizer.INDEX.NAME``; its
metadata holds the rest as JSON. Random numbers need no state: before each step the generators are
seeded with a function of the run's seed and the step (:func:`qkit.flows.train.loop.seed_all`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.targets.staging import as_output_error, staged_file
from qkit.targets.weights import named_tensors, save_tensors

LAST, BEST = "last.safetensors", "best.safetensors"


@dataclass
class Progressed:
    """How far a run is: ``step`` batches of ``epoch`` are done, with ``loss`` summed over
    ``samples``; the best value of the metric so far, and when; whole epochs are in ``history``."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    progressed: Progressed,
    origin: dict[str, Any],
) -> None:
    """Write ``path``: whole, or as it was before."""
    tensors = {f"model.{name}": tensor for name, tensor in named_tensors(model).items()}
    plain: dict[str, Any] = {}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                key = f"{index}.{name}"
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}"] = value
                else:
                    plain[key] = value
    facts = {"origin": origin, "progress": asdict(progressed), "optimizer": plain}
    with as_output_error(path), staged_file(path) as partial:
        save_tensors(tensors, partial, {"qkit": json.dumps(facts)})


def read_facts(path: Path) -> tuple[Progressed, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """How far the run was, what it was made from, and the tensors and other values of the file.

    Raises :class:`~qkit.errors.InputError` for a file that is no checkpoint of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["qkit"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return Progressed(**facts["progress"]), facts["origin"], tensors, facts["optimizer"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "not a checkpoint of a training run, or a damaged one", where=str(path)
        ) from error


def resume_from(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    origin: dict[str, Any],
) -> Progressed:
    """Put the state in ``path`` into ``model`` and ``optimizer``; return how far it was.

    Raises :class:`~qkit.errors.UsageError` if that run was made from something else than
    ``origin``, and what :func:`read_facts` raises.
    """
    progressed, was, tensors, plain = read_facts(path)
    if was != origin:
        differ = sorted(k for k in {*was, *origin} if was.get(k) != origin.get(k))
        raise UsageError(
            "the run to resume was another one",
            where=str(path),
            got=", ".join(f"{name}: {was.get(name)}" for name in differ),
            wanted=", ".join(f"{name}: {origin.get(name)}" for name in differ),
            fix="the options of that run, or another folder for the checkpoints",
        )
    load_model(model, tensors, path)
    state: dict[int, dict[str, Any]] = {}
    values: dict[str, Any] = {
        k.removeprefix("optimizer."): t for k, t in tensors.items() if k.startswith("optimizer.")
    }
    for key, value in (values | plain).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progressed


def load_model(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors ``model.NAME`` into ``model``, each one of which must be there."""
    stored = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    own = named_tensors(model)
    wrong = sorted(own.keys() ^ stored.keys())
    wrong += [n for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape]
    if wrong:
        raise InputError(
            "the checkpoint is of another model", where=str(path), got=", ".join(wrong[:5])
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
