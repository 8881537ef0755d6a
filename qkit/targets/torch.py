"""The torch target: safetensors and JSON on disk, ``qkit::`` operators at run time.

``export`` writes the weights of a quantized model, ``load`` gives them back to a model that is
built on the meta device: the float weights never exist in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qkit.errors import InputError, QkitError, UsageError
from qkit.models import skeleton
from qkit.models.folder import read_config
from qkit.models.folder import read_tensors as read_folder
from qkit.nn import QUANTIZED, QLayer, swap
from qkit.nn.layer import stored_name
from qkit.numerics import dequantize
from qkit.packing import from_tensors, tensor_specs
from qkit.spec import Scheme
from qkit.targets.artifact import (
    ARCHITECTURE,
    CONFIG,
    INDEX,
    META,
    PROGRAM,
    WEIGHTS,
    Artifact,
    LayerFacts,
    read_artifact,
)
from qkit.targets.compressed_tensors import to_own_layout
from qkit.targets.program import load_program
from qkit.targets.quanto import map_of, read_quanto

Into = nn.Module | Callable[[], nn.Module]
T = TypeVar("T")
LAYERS = {layer.__name__: (layer, kind) for kind, layer in QUANTIZED.items()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
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
    for name, _, _, tensor in _tensors(model):
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
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, QLayer)
    }
    buffers = [
        name
        for name, owner, attribute, _ in _tensors(model)
        if attribute in owner._buffers and not isinstance(owner, QLayer)
    ]
    return unique, {"layers": layers, "aliases": aliases, "buffers": buffers}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; equal tensors give equal bytes."""
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
    save_file(plain, path, metadata={"format": "pt"})
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
    """The tensors of the artifact's weights file or shards, mapped from disk.

    Raises :class:`~qkit.errors.InputError` for a shard that is missing or unreadable, and where
    the index and the shards do not agree.
    """
    if artifact.is_compressed_tensors:
        return to_own_layout(read_tensors(artifact.path / WEIGHTS), artifact.layers)
    if (artifact.path / INDEX).is_file() and not (artifact.path / WEIGHTS).is_file():
        return read_folder(artifact.path, trust=False)
    return read_tensors(artifact.path / WEIGHTS)


def load(path: str | Path, into: Into | None = None) -> nn.Module:
    """The quantized model of the artifact (or the folder of optimum-quanto) ``path``, in eval mode.

    ``into`` is the architecture: a function (or class) that returns the float model, called on
    the meta device, or a module, which is changed and returned. Without ``into`` the
    architecture is rebuilt from a Hugging Face configuration in the artifact, or its
    ``torch.export`` program is used. A ``--model`` factory that the artifact names is not called:
    that would let a data file choose what code to run. What of a folder of optimum-quanto becomes
    a quantized layer is said in :mod:`qkit.targets.quanto`.

    Raises :class:`~qkit.errors.InputError` if the folder is not an artifact, or a tensor is
    missing, unexpected or misshapen; :class:`~qkit.errors.UsageError` if ``into`` is needed.
    """
    if map_of(path) is not None:
        return _load_quanto(Path(path), into)
    artifact = read_artifact(path)
    tensors = read_weights(artifact)
    builder = artifact.builder or {"kind": "none"}
    if into is None and builder["kind"] != "transformers":
        if PROGRAM in artifact.files:
            return load_program(artifact, tensors)
        name = builder.get("factory", "package.module:factory")
        raise UsageError(
            "the artifact does not carry its architecture",
            where=str(path),
            fix=f"pass into=ModelClass (or --model {name})",
        )
    config = CONFIG if artifact.is_compressed_tensors else ARCHITECTURE
    return _build(
        into if into is not None else lambda: skeleton(builder, artifact.path / config),
        lambda model: _fill(model, artifact, tensors),
        given=into is not None,
        path=artifact.path,
    )


def _load_quanto(folder: Path, into: Into | None) -> nn.Module:
    names = (read_config(folder) or {}).get("architectures") or []
    if into is None and not (isinstance(names, list) and isinstance(next(iter(names), None), str)):
        raise UsageError(
            "the folder does not carry its architecture",
            where=str(folder),
            fix="pass into=ModelClass (or --model package.module:factory)",
        )
    builder = {"kind": "transformers", "class": next(iter(names), "")}
    return _build(
        into if into is not None else lambda: skeleton(builder, folder / CONFIG),
        lambda model: _fill(model, *read_quanto(folder, model)),
        given=into is not None,
        path=folder,
    )


def _build(
    architecture: Into, fill: Callable[[nn.Module], nn.Module], *, given: bool, path: Path
) -> nn.Module:
    """The ``architecture`` with the tensors that ``fill`` assigns, in eval mode.

    ``given`` says whether it comes from the caller, or from a file in ``path``.
    """
    if isinstance(architecture, nn.Module):
        return fill(architecture).eval()
    # On the meta device a model takes no memory; what it computes in its constructor and keeps
    # as a plain attribute has no values there, and then it is built again on the CPU.
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = architecture()
        except QkitError:
            raise
        except Exception as error:
            if device == "meta":
                continue
            if given:
                raise UsageError(f"the model's factory failed: {error!r}") from error
            raise InputError(
                f"the architecture in the artifact cannot be built: {error}", where=str(path)
            ) from error
        if not isinstance(model, nn.Module):
            raise UsageError("into() must return an nn.Module", got=type(model).__name__)
        model = fill(model)
        if not any(_holds_meta(module) for module in model.modules()):
            return model.eval()
    raise InputError("the model keeps tensors on the meta device", where=str(path))


def _holds_meta(module: nn.Module) -> bool:
    """Whether something that the constructor computed has no values: an attribute or a buffer."""
    kept = [*vars(module).values(), *module._buffers.values()]
    return any(isinstance(value, Tensor) and value.is_meta for value in kept)


def _fill(model: nn.Module, artifact: Artifact, tensors: dict[str, Tensor]) -> nn.Module:
    """Put the artifact's layers and tensors into the float ``model``."""
    tensors = with_aliases(artifact, tensors)
    floats: dict[int, Tensor] = {}
    replacements: dict[str, nn.Module] = {}
    made: dict[int, QLayer] = {}
    for name, facts in artifact.layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(
                f"the model has no layer {name!r}, the artifact has",
                where=str(artifact.path),
                fix="load into the architecture that was quantized",
            ) from error
        if facts.kind not in LAYERS:
            raise InputError(
                "unknown class of a quantized layer",
                where=str(artifact.path / META),
                got=f"{name}: {facts.kind}",
                wanted=", ".join(LAYERS),
            )
        layer, kind = LAYERS[facts.kind]
        _check_shape(name, old, facts)
        stored_tensors(name, facts, tensors)
        if type(old) is kind:
            if id(old) not in made:  # one module at several paths stays one module
                if lacks := layer.lacks(Scheme(facts.spec, facts.acts)):
                    raise InputError(
                        f"{facts.kind} {lacks}", where=str(artifact.path / META), got=name
                    )
                made[id(old)] = layer(cast(Any, old), facts.spec, facts.acts)
            replacements[name] = made[id(old)]
        else:
            # A bare state dict does not tell its layers' classes: what has no quantized form is
            # float again, the same tensor for all that share the codes.
            _unpack(name, facts, tensors, floats)
    model = swap(model, replacements)
    _assign(model, tensors, artifact)
    return model


def _check_shape(name: str, module: nn.Module, facts: LayerFacts) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.shape != facts.shape:
        raise InputError(
            f"the model's layer {name!r} is not the one that was quantized",
            got=f"{type(module).__name__} {tuple(weight.shape) if weight is not None else ''}",
            wanted=f"a weight of shape {facts.shape}",
        )


def with_aliases(artifact: Artifact, tensors: Mapping[str, T]) -> dict[str, T]:
    """``tensors`` (of the weights file), or what stands for them, under all of their names."""
    aliases = artifact.aliases
    if lost := sorted(set(aliases.values()) - tensors.keys()):
        raise InputError(
            "a shared tensor is missing", where=str(artifact.path), got=", ".join(lost)
        )
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _unpack(
    name: str, facts: LayerFacts, tensors: dict[str, Tensor], floats: dict[int, Tensor]
) -> None:
    """Put the float weight of a layer in the place of its stored tensors.

    ``floats`` remembers what codes were unpacked to, so that a shared weight stays one.
    """
    stored = stored_tensors(name, facts, tensors)
    first = id(next(iter(stored.values())))
    if first not in floats:
        q = from_tensors(stored, facts.spec, name=name)
        floats[first] = dequantize(q, getattr(torch, facts.dtype)).reshape(facts.shape)
    prefix = f"{name}." if name else ""
    for key in stored:
        del tensors[prefix + key]
    tensors[prefix + "weight"] = floats[first]


def float_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of the model as it was before, with every quantized weight dequantized."""
    tensors = with_aliases(artifact, read_weights(artifact))
    floats: dict[int, Tensor] = {}
    for name, facts in artifact.layers.items():
        _unpack(name, facts, tensors, floats)
    return tensors


def stored_tensors(
    name: str, facts: LayerFacts, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one quantized weight, by their names in :mod:`qkit.packing.store`.

    Raises :class:`~qkit.errors.InputError` if one is missing or has another shape or dtype.
    """
    stored = {}
    for key, want in tensor_specs(facts.shape, facts.spec, facts.acts).items():
        full = f"{name}.{key}" if name else key
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
    return {name: tensor.detach() for name, _, _, tensor in _tensors(model)}


def _assign(model: nn.Module, tensors: dict[str, Tensor], artifact: Artifact) -> None:
    """Assign every tensor strictly: nothing missing, unexpected or misshapen."""
    made: dict[int, nn.Parameter] = {}
    missing, wrong, used = [], [], set()
    for name, owner, attribute, old in list(_tensors(model)):
        new = tensors.get(name)
        if new is None:
            # A state dict has no such buffers; the constructor computes them.
            if attribute not in owner._non_persistent_buffers_set:
                missing.append(name)
            continue
        used.add(name)
        # A float may be stored in another float type (a cast); codes and indices may not.
        floats = new.is_floating_point() and old.is_floating_point()
        if new.shape != old.shape or not (floats or new.dtype == old.dtype):
            wrong.append(
                f"{name} {new.dtype} {tuple(new.shape)} for {old.dtype} {tuple(old.shape)}"
            )
        elif attribute in owner._parameters:
            made.setdefault(id(new), nn.Parameter(new, requires_grad=old.requires_grad))
            setattr(
                owner, attribute, made[id(new)]
            )  # not _parameters: nn.LSTM keeps a list of its own
        else:
            setattr(owner, attribute, new)
    problems = {
        "missing": missing,
        "unexpected": sorted(tensors.keys() - used),
        "misshapen": wrong,
    }
    told = [f"{len(n)} {what} ({', '.join(n[:5])})" for what, n in problems.items() if n]
    if told:
        raise InputError(
            "the artifact does not fit the model",
            where=str(artifact.path),
            got="; ".join(told),
            fix="load into the architecture that was quantized",
        )


def copy_config(source: Path, folder: Path, *, config_name: str = ARCHITECTURE) -> None:
    """Copy what a Hugging Face folder has beside its weights.

    ``config.json`` becomes ``architecture.json``: under its own name, transformers would take the
    folder for a float model and read int8 codes as float weights, with no more than a warning.
    """
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and "index.json" not in path.name:
            name = config_name if path.name == CONFIG else path.name
            (folder / name).write_bytes(path.read_bytes())
