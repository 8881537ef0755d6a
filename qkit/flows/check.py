"""The check file of an artifact: inputs, and the outputs that a loaded artifact must reproduce.

``input.args.0``, ``input.kwargs.NAME``   what the model was called with
``module.0``, ``module.1``, ...           the outputs of the quantized model, flattened
``layers.NAME``                           where no inputs are known: see :func:`layer_outputs`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qkit import ops
from qkit.errors import InputError
from qkit.models import Inputs, run, split
from qkit.models.checkpoint import BLOCK, Checkpoint, row_blocks
from qkit.numerics import no_scale
from qkit.packing.store import levels_of, matrix_shape
from qkit.spec import Float, QSpec
from qkit.targets.artifact import CHECK, Artifact
from qkit.targets.weights import read_tensors, stored_tensors

# The check file should stay small beside the weights: a large batch is cut to its first samples.
MAX_CHECK_VALUES = 1 << 20


def model_check(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a check file for a quantized ``model`` that takes batches of any size."""
    return recorded(model, small(inputs))


def recorded(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a check file: ``inputs``, all of them, and what ``model`` makes of them."""
    return input_tensors(inputs) | {f"module.{i}": t for i, t in enumerate(run(model, inputs))}


def input_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of ``inputs`` by their keys in a check file."""
    given = {f"input.args.{i}": t for i, t in enumerate(inputs.args)}
    return given | {f"input.kwargs.{name}": t for name, t in inputs.kwargs.items()}


def small(inputs: Inputs) -> Inputs:
    """The first samples of ``inputs``, as many as a check file should hold."""
    tensors = [*inputs.args, *inputs.kwargs.values()]
    values = sum(t.numel() for t in tensors)
    batch = max((t.shape[0] for t in tensors if t.dim()), default=1)
    if values <= MAX_CHECK_VALUES or batch <= 2:
        return inputs
    return split(inputs, max(2, batch * MAX_CHECK_VALUES // values))


def is_callable(artifact: Artifact) -> bool:
    """Whether the check file of ``artifact`` holds inputs and outputs of the whole model."""
    return not artifact.is_coded and any(key.startswith("module.") for key in expected(artifact))


def inputs_of(artifact: Artifact) -> Inputs:
    """The inputs in the check file of ``artifact``."""
    return inputs_in(artifact.path / CHECK)


def inputs_in(path: Path) -> Inputs:
    """The inputs in a file of :func:`input_tensors`, which may hold more."""
    # Not mapped from the file, where they may lie at any address: torch's own int8 product for bf16
    # (in optimum-quanto's layers) crashes on what is not aligned to 32 bytes.
    tensors = {name: t.clone() for name, t in read_tensors(path).items()}
    args = {k: t for k, t in tensors.items() if k.startswith("input.args.")}
    prefix = "input.kwargs."
    if args.keys() != {f"input.args.{i}" for i in range(len(args))}:
        raise InputError("the inputs are not numbered", where=str(path))
    return Inputs(
        args=tuple(args[f"input.args.{i}"] for i in range(len(args))),
        kwargs={k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
        origin=str(path),
    )


def expected(artifact: Artifact) -> dict[str, Tensor]:
    """The outputs in the check file of ``artifact``, by key."""
    tensors = read_tensors(artifact.path / CHECK)
    return {k: t for k, t in tensors.items() if k.startswith(("module.", "layers."))}


def layer_outputs(artifact: Artifact, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One output ``[2, rows]`` of each quantized layer, taken as a matrix, from its stored tensors.

    ``tensors`` are all tensors of the model by name: those in memory when the reference is made,
    those on disk when it is checked. The input is drawn from a generator with a fixed seed, so
    that any process makes the same. A cast has no quantized layers: of each tensor, the sum and
    the sum of magnitudes are taken.
    """
    layers = artifact.layers
    if not layers:
        return {f"layers.{name}": _sums_of(tensors, name) for name in tensors}
    outputs = {}
    for name, facts in layers.items():
        stored = stored_tensors(name, facts, tensors)
        outputs[f"layers.{name}"] = weight_output(stored, matrix_shape(facts.shape)[1], facts.spec)
    return outputs


def _sums_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if isinstance(tensors, Checkpoint):  # larger than memory, maybe
        return sum((sums(block) for _, block in tensors.blocks(name, BLOCK)), NO_SUMS)
    tensor = tensors[name]
    if not tensor.dim():
        return sums(tensor)
    return sum((sums(tensor[i : i + n]) for i, n in row_blocks(tensor, BLOCK)), NO_SUMS)


NO_SUMS = torch.zeros(2, dtype=torch.float64)


def sums(block: Tensor) -> Tensor:
    """The sum of some rows of a tensor and that of their magnitudes, fp64 ``[2]``."""
    wide = block.double()
    return torch.stack([wide.sum(), wide.abs().sum()])


def weight_output(stored: Mapping[str, Tensor], columns: int, spec: QSpec) -> Tensor:
    """The output ``[2, rows]`` of one weight, or of some of its rows, from its stored tensors."""
    packed, whole = stored.get("weight_packed"), stored.get("weight")
    codes = packed if whole is None else whole.flatten(1)
    levels = stored.get("weight_levels")
    if isinstance(spec.format, Float):  # they follow from the format, and are not stored
        levels = levels_of(spec.format)
    # The weight alone: activations are quantized by no tensor but the static range.
    return (ops.linear if levels is None else ops.linear_codebook)(
        torch.randn(2, columns, generator=torch.Generator().manual_seed(columns)),
        codes,
        no_scale().scale if spec.is_cast else stored["weight_scale"],
        stored.get("weight_zero_point") if levels is None else levels,
        None,
        spec.format.bits,
        spec.group_size,
    )
