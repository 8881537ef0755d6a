"""``load``: a model from any kind of file, safely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from qkit.errors import InputError
from qkit.models.exported import read_program
from qkit.models.factory import fill, resolve_factory
from qkit.models.folder import load_transformers, read_config, read_safetensors, refuse_quanto
from qkit.models.folder import read_tensors as read_folder
from qkit.models.loaded import Loaded, Source, facts_of
from qkit.models.pickles import check_storage, read_pickle
from qkit.models.script import read_script
from qkit.models.sniff import EXPORT, FOLDER, SAFETENSORS, TORCHSCRIPT, sniff, weight_files

# Where training loops put the model's tensors, the most specific first.
NESTED = (
    "model_state_dict",
    "state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema_state_dict",
    "ema",
    "model_ema",
)
# Prefixes that wrappers add to every name: DataParallel, torch.compile.
PREFIXES = ("module.", "_orig_mod.")


def load(
    path: str | Path,
    *,
    factory: str | Callable[[], nn.Module] | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """The model in ``path``, recognised by its content and read without executing it.

    ``factory`` (a callable, or ``package.module:factory``) builds the architecture for a file
    that holds only tensors. ``trust_pickle`` unpickles without an allow-list, which runs the code
    that the file names: only for files from somebody you trust.

    Raises :class:`~qkit.errors.InputError` for what is not a model or cannot be read, and
    :class:`~qkit.errors.UnsafePickleError` for a file that would run code.
    """
    path = Path(path)
    kind = sniff(path)
    files = [path]
    if kind == FOLDER:
        files = weight_files(path)
        files += [path / "config.json"] if (path / "config.json").is_file() else []
    build = resolve_factory(factory) if isinstance(factory, str) else factory
    builder = {"kind": "factory", "factory": factory} if isinstance(factory, str) else None
    loaded = _read(path, kind, trust_pickle, build is not None)
    source = Source(str(path), kind, facts_of(files), loaded.source.notes)
    loaded = replace(loaded, source=source, builder=builder or loaded.builder)
    if loaded.state_dict is not None:
        for name, tensor in loaded.state_dict.items():
            check_storage(name, tensor, str(path))
    if build is not None:
        state = loaded.state_dict
        if state is None:
            assert loaded.model is not None
            state = {k: v for k, v in loaded.model.state_dict().items() if isinstance(v, Tensor)}
        model = fill(build, state, str(path))
        loaded = replace(loaded, model=model, state_dict=None, layer_kinds={})
    if loaded.model is not None:
        _check_model(loaded.model, str(path))
    return loaded


def _check_model(model: nn.Module, where: str) -> None:
    """Put ``model`` in eval mode; refuse one whose attributes are not those of a module.

    Unpickled attributes are whatever the file says.
    """
    try:
        tensors: dict[str, Tensor] = {}
        tensors |= dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("a parameter is not a tensor")
        model.state_dict(keep_vars=True)
        model.eval()
    except Exception as error:  # whatever the attributes lead to
        raise InputError(
            f"the model in the file is corrupt: {type(error).__name__}", where=where
        ) from error
    for name, tensor in tensors.items():
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InputError(
                "the model is not initialised: a lazy module has not seen an input yet",
                where=f"{where}: {name}",
                fix="run the model once before saving it",
            )
        check_storage(name, tensor, where)


def _read(path: Path, kind: str, trust: bool, has_factory: bool) -> Loaded:
    source = Source(str(path), kind, {})
    if kind == SAFETENSORS:
        return as_state_dict(source, read_safetensors(path))
    if kind == TORCHSCRIPT:
        return _read_torchscript(path, source)
    if kind == EXPORT:
        model, inputs = read_program(path, trust=trust)
        return Loaded(source, model=model, example_inputs=inputs)
    if kind == FOLDER:
        return _read_folder(path, source, trust, has_factory)
    return from_object(read_pickle(path, kind, trust=trust), source)


def _read_folder(path: Path, source: Source, trust: bool, has_factory: bool) -> Loaded:
    refuse_quanto(path)
    config = read_config(path)
    if config is not None and not has_factory:
        built = load_transformers(path, config, trust=trust)
        if built is not None:
            model, name, notes = built
            source = replace(source, notes=tuple(notes))
            return Loaded(source, model=model, builder={"kind": "transformers", "class": name})
    loaded = as_state_dict(source, read_folder(path, trust=trust))
    if has_factory or config is None:
        return loaded
    note = "the architecture was not built (pip install 'qkit-torch[hf]'): tensors only"
    return replace(loaded, source=replace(source, notes=(*loaded.source.notes, note)))


def _read_torchscript(path: Path, source: Source) -> Loaded:
    """TorchScript is not Python and is not run here: only its tensors and class names are taken."""
    state, kinds = read_script(path)
    return replace(as_state_dict(source, state), layer_kinds=kinds)


def from_object(value: Any, source: Source) -> Loaded:
    """The model or state dict in an unpickled object, wherever a training loop put it."""
    if isinstance(value, nn.Module):
        try:
            return _module(value, source)
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise InputError("the model in the file is corrupt", where=source.path) from error
    if not isinstance(value, Mapping):
        raise InputError("not a model", where=source.path, got=f"a {type(value).__name__}")
    if _is_state_dict(value):
        return as_state_dict(source, value)
    found = {
        key: below for key, below in value.items() if isinstance(key, str) and _is_model(below)
    }
    known = [key for key in NESTED if key in found]
    if not known and len(found) != 1:
        keys = ", ".join(repr(key)[:40] for key in list(found or value)[:8]) or "nothing"
        problem = "more than one model in the file" if found else "no model in the file"
        raise InputError(problem, where=source.path, got=f"entries: {keys}", wanted="a state dict")
    key = known[0] if known else next(iter(found))
    source = replace(source, notes=(*source.notes, f"took the entry {key!r} of the checkpoint"))
    return from_object(found[key], source)


def _module(model: nn.Module, source: Source) -> Loaded:
    inner = model
    while isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)
    if inner is not model:
        note = f"unwrapped {type(model).__name__}"
        source = replace(source, notes=(*source.notes, note))
    return Loaded(source, model=inner)


def _is_state_dict(value: object) -> bool:
    """Mostly tensors, under string names; a number or an extra state may be among them."""
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(v, Tensor) for v in value.values())
    return tensors * 2 > len(value) and all(isinstance(k, str) for k in value)


def _is_model(value: object) -> bool:
    return isinstance(value, nn.Module) or _is_state_dict(value)


def as_state_dict(source: Source, state: Mapping[str, Any]) -> Loaded:
    """The tensors of ``state`` without the prefixes of wrappers; at least one."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    notes = list(source.notes)
    if dropped := [name for name in state if name not in tensors]:
        notes.append(f"left out what is not a tensor: {', '.join(dropped[:5])}")
    if not tensors:
        raise InputError("the file holds no tensors", where=source.path)
    while prefix := next((p for p in PREFIXES if _all_start(tensors, p)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        notes.append(f"removed the prefix {prefix!r} from every name")
    return Loaded(replace(source, notes=tuple(notes)), state_dict=tensors)


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)
