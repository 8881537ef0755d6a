"""The ``torch.export`` program of an artifact: its graph; the weights come from safetensors."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

import qkit.ops  # noqa: F401  (a program names these operators)
from qkit.errors import InputError
from qkit.models import Inputs, check_program
from qkit.nn.layer import stored_name
from qkit.targets.artifact import PROGRAM, Artifact

MAX_BATCH = 1 << 16


def write_program(model: nn.Module, inputs: Inputs, path: Path) -> str | None:
    """Write the program of ``model`` for ``inputs``; return why not, if it cannot be captured.

    The leading dimension that all inputs share (two or more) is dynamic if the model allows it.
    """
    failure: Exception | None = None
    for shapes in (_dynamic_batch(inputs), None):
        try:
            with warnings.catch_warnings():
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


def load_program(artifact: Artifact, tensors: dict[str, Tensor]) -> nn.Module:
    """The program of ``artifact`` with ``tensors`` (of its weights file) as its weights."""
    path = artifact.path / PROGRAM
    if (artifact.builder or {}).get("kind") == "transformers":
        # Outputs of such models are classes of that library; the program's file names them.
        import transformers.modeling_outputs  # noqa: F401
    check_program(path)
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
    return program.module()
