"""The ``torch.export`` program of an artifact: its graph; the weights come from safetensors."""

from __future__ import annotations

import importlib
import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

import qkit.ops  # noqa: F401  (a program names these operators)
from qkit.errors import InputError, MissingExtraError, UnsafePickleError
from qkit.graph.capture import without_cache
from qkit.models import Inputs, check_program
from qkit.nn.layer import stored_name
from qkit.ops.direct import call_directly
from qkit.targets.artifact import PROGRAM, Artifact

MAX_BATCH = 1 << 16
# Where transformers defines classes of outputs.
_OUTPUTS = re.compile(r"\btransformers\.(?:models\.\w+\.)?modeling_\w+")


def write_program(model: nn.Module, inputs: Inputs, path: Path) -> str | None:
    """Write the program of ``model`` for ``inputs``; return why not, if there can be none.

    A graph that :func:`load_program` would refuse (it calls operators of another library, or fails
    on some values by a message of its own) is no program of an artifact. The leading dimension
    that all inputs share (two or more) is dynamic if the model allows it.
    """
    failure: Exception | None = None
    for shapes in (_dynamic_batch(inputs), None):
        try:
            with warnings.catch_warnings(), without_cache(model):
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False
                )
            break
        except Exception as error:  # torch.export raises whatever the model's code raises
            failure = error
    else:
        return f"torch.export cannot capture the model: {_first_line(failure)}"
    _forget_values(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Through memory: torch's own writer would tell a full disk as an internal error.
        torch.export.save(program, buffer := io.BytesIO())
    path.write_bytes(buffer.getvalue())
    try:
        check_program(path)
    except UnsafePickleError as refused:
        path.unlink()
        return f"its graph holds more than qkit loads: {refused.got}"
    return None


def _first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def _dynamic_batch(inputs: Inputs) -> Any:
    tensors = [*inputs.args, *inputs.kwargs.values()]
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    if len(sizes) != 1 or next(iter(sizes)) in (None, 0, 1):
        return None
    shapes, batch = ShapesCollection(), Dim("batch", min=1, max=MAX_BATCH)
    for tensor in tensors:
        shapes[tensor] = {0: batch}
    return shapes


def _forget_values(program: ExportedProgram) -> None:
    """Drop weights, example inputs and source locations: the file is the graph alone.

    The weights are stored once, in safetensors; example inputs may be private, and the source
    paths of the machine that exported have no place in an artifact.
    """
    program._state_dict = {name: _like(t.to("meta"), t) for name, t in program.state_dict.items()}
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _like(value: Tensor, old: Tensor) -> Tensor:
    """``value`` as a Parameter if ``old`` is one."""
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _import_outputs(path: Path) -> None:
    """Import the modules of transformers that define the outputs of the program in ``path``.

    Such a class is known to torch once its module is imported; no other module is.
    """
    with zipfile.ZipFile(path) as archive:
        graph = next(name for name in archive.namelist() if name.endswith("/models/model.json"))
        text = archive.read(graph).decode()
    for spec in set(re.findall(r'"out_spec": ("(?:[^"\\]|\\.)*")', text)):
        for module in sorted(set(_OUTPUTS.findall(json.loads(spec)))):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise MissingExtraError(
                    "transformers", "hf", needed_for="the outputs of the program"
                ) from error


def load_program(artifact: Artifact, tensors: dict[str, Tensor]) -> nn.Module:
    """The program of ``artifact`` with ``tensors`` (of its weights file) as its weights."""
    path = artifact.path / PROGRAM
    check_program(path)
    _import_outputs(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own use of itself
            program = torch.export.load(path)
    except Exception as error:  # the file's contents decide what is raised
        raise InputError(
            f"cannot read the program: {_first_line(error)}", where=str(path)
        ) from error
    aliases = artifact.aliases

    def value(name: str, old: Tensor) -> Tensor:
        key = stored_name(name)
        key = aliases.get(key, key)
        new = tensors.get(key)
        if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
            raise InputError("the program and the weights do not belong together", where=name)
        return _like(new, old)

    program._state_dict = {name: value(name, old) for name, old in program.state_dict.items()}
    return call_directly(program.module())
