"""Tensors on disk: what is stored of a model, how it is written, and how it is read back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.models.folder import read_tensors as read_folder
from qkit.nn import QLayer
from qkit.nn.factorized import Factorized
from qkit.nn.layer import stored_name
from qkit.numerics import dequantize
from qkit.packing import from_tensors, tensor_specs
from qkit.packing.container import open_container
from qkit.packing.store import join
from qkit.pruning.surgery import edits_of
from qkit.targets.artifact import INDEX, WEIGHTS, Artifact, LayerFacts
from qkit.targets.coded import derived_tensors
from qkit.targets.compressed_tensors import to_own_layout

T = TypeVar("T")


def tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer at every path: (stored name, owner, attribute, tensor)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and attribute not in getattr(module, "derived", ()):
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield stored_name(name), module, attribute, tensor


def write_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write every tensor of ``model`` once; return what ``qkit.json`` says about them."""
    unique, facts = describe_weights(model)
    save_tensors(unique, folder / WEIGHTS)
    return facts


def describe_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``model`` to store, each once, and what ``qkit.json`` says about them."""
    first: dict[int, str] = {}
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, _, _, tensor in tensors_of(model):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            unique[name] = tensor
    layers = {
        name: {
            "class": type(layer).__name__,
            "shape": list(layer.weight_size),
            "dtype": str(layer.weight_dtype).removeprefix("torch."),
            "spec": layer.spec.to_json(),
            "input": layer.acts and layer.acts.to_json(),
        }
        | ({"turned": layer.turned_by} if layer.turned_by else {})
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, QLayer)
    }
    buffers = [
        name
        for name, owner, attribute, _ in tensors_of(model)
        if attribute in owner._buffers and not isinstance(owner, QLayer)
    ]
    opened = {
        name: module.opened_from
        for name, module in model.named_modules(remove_duplicate=False)
        if vars(module).get("opened_from")
    }
    factorized = {
        name: {"kind": module.kind, "ranks": list(module.ranks), "sizes": list(module.sizes)}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Factorized)
    }
    facts = {"layers": layers, "opened": opened, "aliases": aliases, "buffers": buffers}
    edits = edits_of(model)
    facts |= {"factorized": factorized} if factorized else {}
    return unique, facts | ({"pruned": edits.to_json()} if edits else {})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with ``facts`` in its metadata; equal tensors give equal bytes."""
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        plain[name] = (
            tensor.contiguous()
            if whole and tensor.is_contiguous()
            else tensor.clone(memory_format=torch.contiguous_format)
        )
    # Two tensors may still be the same memory (a view registered twice); the format forbids that.
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(plain, path, metadata={"format": "pt", **(facts or {})})
    os.chmod(path, 0o666 & ~_umask())  # the library writes files that only their owner can read


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from disk rather than read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the weights: {error}", where=str(path)) from error


def read_weights(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of the artifact's weights file or shards, mapped from disk, or of a coded file.

    Raises :class:`~qkit.errors.InputError` for a shard that is missing or unreadable, and where
    the index and the shards do not agree.
    """
    if artifact.is_coded:
        return open_container(artifact.path).tensors() | derived_tensors(artifact)
    if artifact.is_compressed_tensors:
        return to_own_layout(read_tensors(artifact.path / WEIGHTS), artifact.layers)
    if artifact.weights == [artifact.path / WEIGHTS] or not (artifact.path / INDEX).is_file():
        return read_tensors(artifact.path / WEIGHTS)
    return read_folder(artifact.path, trust=False)


def with_aliases(artifact: Artifact, tensors: Mapping[str, T]) -> dict[str, T]:
    """``tensors`` (of the weights file), or what stands for them, under all of their names."""
    aliases = artifact.aliases
    if lost := sorted(set(aliases.values()) - tensors.keys()):
        raise InputError(
            "a shared tensor is missing", where=str(artifact.path), got=", ".join(lost)
        )
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def unpack(
    name: str, facts: LayerFacts, tensors: dict[str, Tensor], floats: dict[int, Tensor]
) -> None:
    """Put the float weight of a layer in the place of its stored tensors.

    ``floats`` remembers what codes were unpacked to, so that a shared weight stays one.
    """
    stored = stored_tensors(name, facts, tensors)
    first = id(next(iter(stored.values())))
    if first not in floats:
        q = from_tensors(stored, facts.spec, name=name)
        floats[first] = facts.as_weight(dequantize(q, getattr(torch, facts.dtype)))
    for key in stored:
        del tensors[join(name, key)]
    tensors[join(name, "weight")] = floats[first]


def float_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of the model as it was before, with every quantized weight dequantized."""
    tensors = with_aliases(artifact, read_weights(artifact))
    floats: dict[int, Tensor] = {}
    for name, facts in artifact.layers.items():
        unpack(name, facts, tensors, floats)
    return tensors


def stored_tensors(
    name: str, facts: LayerFacts, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one quantized weight, by their names in :mod:`qkit.packing.store`.

    Raises :class:`~qkit.errors.InputError` if one is missing or has another shape or dtype.
    """
    stored = {}
    for key, want in tensor_specs(facts.shape, facts.spec, facts.acts).items():
        full = join(name, key)
        have = tensors.get(full)
        if have is None or (tuple(have.shape), have.dtype) != (want.shape, want.dtype):
            raise InputError(
                "the stored tensors do not fit the layer",
                where=full,
                got="nothing" if have is None else f"{have.dtype} {tuple(have.shape)}",
                wanted=f"{want.dtype} {want.shape}",
            )
        stored[key] = have
    return stored


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of ``model`` by its name on disk; a shared one under each of its names."""
    return {name: tensor.detach() for name, _, _, tensor in tensors_of(model)}
