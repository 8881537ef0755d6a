"""Folders for other tools, loaded by those tools without qkit's help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import InputError
from qkit.models.factory import offline_transformers, spread, ties_of, transformers_class
from qkit.targets.artifact import CONFIG, WEIGHTS
from qkit.targets.quanto import map_of
from qkit.targets.weights import read_tensors


def class_named(folder: Path) -> str | None:
    """The class that the ``config.json`` of a Hugging Face folder names; None where none is."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = config.get("architectures")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{CONFIG} is corrupt: {error}", where=str(folder)) from error
    found = names[0] if isinstance(names, list) and names else None
    return found if isinstance(found, str) else None


def from_pretrained(folder: Path, name: str) -> nn.Module:
    """The model of the class ``name`` as transformers loads it."""
    with offline_transformers() as transformers:
        cls = transformers_class(transformers, name, folder)
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {key: sorted(map(str, info[key])) for key in info if info[key]}
    if wrong:
        raise InputError("transformers does not load the weights", got=json.dumps(wrong)[:500])
    return model.eval()


def requantized(folder: Path, name: str | None, architecture: Any) -> nn.Module:
    """The model as optimum-quanto loads it: of transformers' class ``name``, or into the
    ``architecture``, a module or what makes one."""
    from optimum.quanto import requantize

    path = map_of(folder)
    assert path is not None
    if name is not None:
        with offline_transformers() as transformers:
            cls = transformers_class(transformers, name, folder)
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            model = cls._from_config(config)  # as quanto does: in the dtype that config.json names
    else:
        model = architecture if isinstance(architecture, nn.Module) else architecture()
    assert isinstance(model, nn.Module)
    # Copied, not mapped: see BF16_CRASH in qkit.flows.quanto.
    stored = {key: t.clone() for key, t in read_tensors(folder / WEIGHTS).items()}
    state = spread(stored, ties_of(model))
    requantize(model, dict(state), json.loads(path.read_text(encoding="utf-8")))
    # It loads what it finds and is content.
    if wrong := model.state_dict().keys() ^ state.keys():
        raise InputError("optimum-quanto does not load the weights", got=", ".join(sorted(wrong)))
    if tie := getattr(model, "tie_weights", None):
        tie()
    return model.eval()
