"""Architectures: built by a function of the user's, or by transformers from a configuration."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qkit.errors import InputError, MissingExtraError, UsageError

Factory = Callable[[], nn.Module]
T = TypeVar("T")


def resolve_factory(spec: str) -> Factory:
    """The function or class that ``package.module:factory`` or ``file.py:factory`` names.

    The working directory is searched too, as by ``python -m``. Importing runs that module.
    Raises :class:`~qkit.errors.UsageError` if it cannot be found or called.
    """
    value = resolve_callable(spec)
    return lambda: _checked(value(), spec)


def resolve_callable(spec: str) -> Callable[[], Any]:
    """What :func:`resolve_factory` finds, whatever it returns."""
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise UsageError("not a factory", got=repr(spec), wanted="package.module:factory")
    try:
        module = _import(module_name)
    except UsageError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise UsageError(
            f"cannot import {module_name!r}: {_first_line(error)}",
            fix="run qkit from the folder that holds it, or install it",
        ) from error
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise UsageError(
            f"{module_name!r} has no function or class {name!r}"
            if value is None
            else "not callable",
            got=repr(spec),
        )
    return value


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise UsageError("no such file", got=name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError("not a Python file", got=name)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up; another of that name stays.
    other = sys.modules.get(path.stem)
    if other is None or getattr(other, "__file__", None) == spec.origin:
        sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}"


def _checked(model: object, spec: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(
            "the factory returned no nn.Module", got=f"{type(model).__name__} from {spec}"
        )
    return model


def fill(factory: Factory, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The factory's model with the tensors of ``state``, strictly; on the meta device if possible.

    A model that computes tensors in its constructor needs their values, so it is built on the CPU.
    """
    model = _build(factory, "meta")
    if model is None or _computes_tensors(model, state):
        model = _build(factory, "cpu")
        assert model is not None
    ties = ties_of(model)
    state = spread(state, ties)
    _check_state(model, state, where)
    try:
        model.load_state_dict(dict(state), strict=True, assign=True)
    except Exception as error:  # the model's own hooks
        raise InputError(
            f"the model of --model refuses the tensors: {type(error).__name__}", where=where
        ) from error
    for names in ties:  # assigning gave each name a parameter of its own
        _tie(model, names, where)
    return model


def ties_of(model: nn.Module) -> list[list[str]]:
    """The names that stand for one parameter, of each parameter with several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def spread(state: Mapping[str, T], ties: list[list[str]]) -> dict[str, T]:
    """``state`` with each of the ``ties`` (:func:`ties_of`) under all its names.

    safetensors keep one of them.
    """
    full = dict(state)
    for names in ties:
        given = next((state[name] for name in names if name in state), None)
        if given is not None:
            full |= {name: given for name in names if name not in full}
    return full


def _tie(model: nn.Module, names: list[str], where: str) -> None:
    first = model.get_parameter(names[0])
    for name in names[1:]:
        if not torch.equal(model.get_parameter(name), first):
            raise InputError(
                "two tensors that the model of --model shares differ in the file",
                where=where,
                got=f"{names[0]} and {name}",
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, first)


def _build(factory: Factory, device: str) -> nn.Module | None:
    try:
        with torch.device(device):
            return _checked(factory(), "the factory")
    except UsageError:
        raise
    except Exception as error:
        if device == "meta":
            return None
        raise UsageError(f"the model's factory failed: {_first_line(error)}") from error


def _computes_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the constructor made tensors whose values ``state`` does not hold."""
    known = [*spread(state, ties_of(model))]
    named = [*model.named_parameters(), *model.named_buffers()]
    if any(n not in known and t.is_meta for n, t in named):
        return True
    skipped = {"_parameters", "_buffers", "_modules"}
    return any(
        _holds_meta(value, 4)
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in skipped
    )


def _holds_meta(value: object, depth: int) -> bool:
    """Whether a tensor without values is in ``value``."""
    if isinstance(value, Tensor):
        return value.is_meta
    if depth == 0 or isinstance(value, nn.Module | type):
        return False
    below: list[object] = []
    if isinstance(value, Mapping):
        below = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        below = list(value)
    elif isinstance(value, functools.partial):
        below = [*value.args, *value.keywords.values()]
    elif hasattr(value, "__dict__"):
        below = list(vars(value).values())
    return any(_holds_meta(each, depth - 1) for each in below)


def _check_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = model.state_dict()
    tensors = {
        name: value
        for name, value in own.items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }
    problems = {
        "missing": [n for n in own if n not in state],
        "unexpected": [n for n in state if n not in own],
        "misshapen": [
            f"{n} {tuple(state[n].shape)} for {tuple(t.shape)}"
            for n, t in tensors.items()
            if n in state and state[n].shape != t.shape
        ],
    }
    told = [f"{len(n)} {what}: {', '.join(n[:5])}" for what, n in problems.items() if n]
    if told:
        raise InputError(
            "the tensors do not fit the model of --model", where=where, got="; ".join(told)
        )


def skeleton(builder: Mapping[str, Any], config_path: Path) -> nn.Module:
    """The architecture that ``builder`` describes, for transformers with its configuration file.

    Meant to be called under ``torch.device("meta")``. Raises
    :class:`~qkit.errors.MissingExtraError` if transformers is needed and missing.
    """
    if builder["kind"] == "factory":
        return resolve_factory(builder["factory"])()
    if builder["kind"] != "transformers":
        raise InputError("the artifact's architecture is of an unknown kind", got=builder["kind"])
    with offline_transformers() as transformers:
        config = transformers.AutoConfig.from_pretrained(config_path, trust_remote_code=False)
        model: nn.Module = transformers_class(transformers, builder["class"], config_path)(config)
    return model


def transformers_class(transformers: Any, name: str, folder: Path) -> Any:
    """The model class ``name`` of transformers; remote code is never fetched or run."""
    try:
        found = getattr(transformers, name, None)
    except Exception:  # its module needs a package that is not installed
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(
            f"transformers has no model class {name!r}",
            where=str(folder),
            fix="--model package.module:factory builds the architecture",
        )
    return found


@contextmanager
def offline_transformers() -> Iterator[Any]:
    """The transformers library, quiet and without network while the block runs."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", needed_for="a Hugging Face folder") from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
