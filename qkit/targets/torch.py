"""The torch target: safetensors and JSON on disk, ``qkit::`` operators at run time.

``load`` gives the weights of an artifact to a model that is built on the meta device: the float
weights never exist in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qkit.errors import InputError, QkitError, UsageError
from qkit.models import skeleton
from qkit.models.folder import read_config
from qkit.nn import QUANTIZED, QLayer, keep_floats, open_modules, opening, swap
from qkit.nn.computed import computed_by
from qkit.nn.factorized import Factorized, empty_factors, obstacle
from qkit.nn.names import closed_name
from qkit.pruning.surgery import Edits, reshape
from qkit.spec import Scheme
from qkit.targets.artifact import (
    ARCHITECTURE,
    CONFIG,
    PROGRAM,
    Artifact,
    LayerFacts,
    read_artifact,
)
from qkit.targets.program import load_program
from qkit.targets.quanto import map_of, read_quanto
from qkit.targets.weights import (
    read_weights,
    stored_tensors,
    tensors_of,
    unpack,
    with_aliases,
)

Into = nn.Module | Callable[[], nn.Module]
LAYERS = {layer.__name__: layer for layer in QUANTIZED.values()}


def load(path: str | Path, into: Into | None = None, *, runtime_cache: bool = False) -> nn.Module:
    """The quantized model of the artifact (or the folder of optimum-quanto) ``path``, in eval mode.

    ``into`` is the architecture: a function (or class) that returns the float model, called on
    the meta device, or a module, which is changed and returned. Without ``into`` the
    architecture is rebuilt from a Hugging Face configuration in the artifact, or its
    ``torch.export`` program is used. A ``--model`` factory that the artifact names is not called:
    that would let a data file choose what code to run. What of a folder of optimum-quanto becomes
    a quantized layer is said in :mod:`qkit.targets.quanto`. ``runtime_cache`` lets convolutions
    keep their weights in float (:func:`qkit.nn.keep_floats`); a program has no layers for that.

    Raises :class:`~qkit.errors.InputError` if the folder is not an artifact, or a tensor is
    missing, unexpected or misshapen; :class:`~qkit.errors.UsageError` if ``into`` is needed.
    """
    model = _load(path, into)
    if runtime_cache:
        keep_floats(model)
    return model


def _load(path: str | Path, into: Into | None) -> nn.Module:
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
    model, closed = _open(model, artifact)
    model = _factorize(model, artifact)
    if edits := artifact.edits:
        model = _prune(model, edits, artifact)
    floats: dict[int, Tensor] = {}
    replacements: dict[str, nn.Module] = {}
    made: dict[int, QLayer] = {}
    for name, facts in artifact.layers.items():
        if facts.kind not in LAYERS:
            raise InputError(
                "unknown class of a quantized layer",
                where=str(artifact.head),
                got=f"{name}: {facts.kind}",
                wanted=", ".join(LAYERS),
            )
        stored_tensors(name, facts, tensors)
        parent, _, leaf = name.rpartition(".")
        if parent in closed and closed_name(f"{leaf}.weight") != f"{leaf}.weight":
            unpack(name, facts, tensors, floats)
            continue
        old = _module(model, name, artifact)
        _check_shape(name, old, facts)
        layer = QUANTIZED.get(type(old))
        lacks = layer and layer.lacks(Scheme(facts.spec, facts.acts))
        if lacks and layer is LAYERS[facts.kind]:
            raise InputError(f"{facts.kind} {lacks}", where=str(artifact.head), got=name)
        # A bare state dict does not tell its layers' classes: the codes are those of any class that
        # stores its weight so. What has no quantized form is float again, the same tensor for all
        # that share the codes.
        if layer is None or lacks or layer.unfit(old) or layer.turned(old) != facts.turned:
            unpack(name, facts, tensors, floats)
            continue
        if id(old) not in made:  # one module at several paths stays one module
            made[id(old)] = layer(old, facts.spec, facts.acts)
        replacements[name] = made[id(old)]
    model = swap(model, replacements)
    _assign(model, _closed(tensors, closed), artifact)
    return model


def _open(model: nn.Module, artifact: Artifact) -> tuple[nn.Module, list[str]]:
    """``model`` with the modules opened that the artifact opened, and those that cannot be.

    The modules of a bare state dict were guessed: another class gets its raw parameters back.
    """
    names, closed = [], []
    for name, kind in artifact.opened.items():
        module = _module(model, name, artifact)
        form = opening(module)
        if form is not None and form.kind != kind:
            raise _another(name, form.kind, f"a {kind}")
        if form is not None:
            names.append(name)
        elif name not in artifact.layers:
            closed.append(name)
        # else the weight of a layer was computed when it was quantized, and now is not: as good
    return open_modules(model, names), closed


def _prune(model: nn.Module, edits: Edits, artifact: Artifact) -> nn.Module:
    """``model`` with the shapes of the pruned one; it may be pruned already."""
    try:
        return reshape(model, edits)
    except KeyError as error:
        raise InputError(
            f"the model has no {error.args[0]!r} of the kind that was pruned",
            where=str(artifact.path),
            fix="load into the architecture that was pruned",
        ) from error


def _factorize(model: nn.Module, artifact: Artifact) -> nn.Module:
    """``model`` with factors where the artifact has some; it may have them already."""
    computed = [n for n in artifact.factorized if computed_by(_module(model, n, artifact))]
    model = open_modules(model, computed)
    made: dict[str, nn.Module] = {}
    for name, (kind, ranks, sizes) in artifact.factorized.items():
        layer = _module(model, name, artifact)
        if isinstance(layer, Factorized):
            continue
        if lacks := obstacle(layer, kind):
            raise _another(name, f"{type(layer).__name__}: {lacks}", f"what has {kind} factors")
        made[name] = empty_factors(layer, kind, ranks, sizes)
    return swap(model, made)


def _closed(tensors: dict[str, Tensor], closed: list[str]) -> dict[str, Tensor]:
    """``tensors`` with those of the modules ``closed`` under the names that they had before."""

    def rename(name: str) -> str:
        for parent in closed:
            prefix = f"{parent}." if parent else ""
            if name.startswith(prefix):
                return prefix + closed_name(name.removeprefix(prefix))
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _module(model: nn.Module, name: str, artifact: Artifact) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            f"the model has no layer {name!r}, the artifact has",
            where=str(artifact.path),
            fix="load into the architecture that was quantized",
        ) from error


def _check_shape(name: str, module: nn.Module, facts: LayerFacts) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.shape != facts.float_shape:
        shape = "" if weight is None else f" {tuple(weight.shape)}"
        raise _another(
            name, type(module).__name__ + shape, f"a weight of shape {facts.float_shape}"
        )


def _another(name: str, got: str, wanted: str) -> InputError:
    problem = f"the model's layer {name!r} is not the one that was quantized"
    return InputError(problem, got=got, wanted=wanted)


def _assign(model: nn.Module, tensors: dict[str, Tensor], artifact: Artifact) -> None:
    """Assign every tensor strictly: nothing missing, unexpected or misshapen."""
    made: dict[int, nn.Parameter] = {}
    missing, wrong, used = [], [], set()
    for name, owner, attribute, old in list(tensors_of(model)):
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
