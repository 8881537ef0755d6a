"""What loading gives: the model (or its tensors), and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkit.models.inputs import Inputs


@dataclass(frozen=True)
class Source:
    """What was read: the ``path``, its ``kind`` (see :func:`qkit.models.sniff`), the files with
    their SHA-256 and bytes, and remarks about what was adjusted while reading."""

    path: str
    kind: str
    files: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, or, where the file does not tell its classes, a state dict.

    ``layer_kinds`` maps module names to class names for a state dict whose file knew them.
    ``builder`` says how the architecture is rebuilt without pickle (:func:`skeleton`), or is None.
    ``example_inputs`` are those stored in a ``torch.export`` program.
    """

    source: Source
    model: nn.Module | None = None
    state_dict: dict[str, Tensor] | None = None
    layer_kinds: dict[str, str] = field(default_factory=dict)
    builder: dict[str, Any] | None = None
    example_inputs: Inputs | None = None


def facts_of(
    files: Sequence[Path], go_on: Callable[[int], bool] = lambda done: True
) -> dict[str, dict[str, Any]]:
    """Name, SHA-256 and size of each file.

    ``go_on`` is asked before each piece, with the bytes that are read; where it says no, the facts
    are cut short, and worthless.
    """
    facts, done = {}, 0
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while go_on(done) and (piece := file.read(1 << 20)):
                digest.update(piece)
                done += len(piece)
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return facts
