"""Inputs for a model: described on the command line, read from .npz files; and running on them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
# Random integers are below this: small enough for the table of most embeddings.
DEFAULT_HIGH = 100
MAX_VALUES = 1 << 30


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, and in words where it comes from."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    origin: str


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, high: int = DEFAULT_HIGH
) -> Tensor:
    """Standard normal floats, or integers in [0, high), from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 2 if dtype == torch.bool else high
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def parse_input_spec(text: str, *, seed: int = 0, high: int = DEFAULT_HIGH) -> Inputs:
    """Random inputs as ``1x3x224x224``, ``2x16:int64`` or several with commas describe them.

    Raises :class:`~qkit.errors.UsageError` for anything else.
    """
    tensors = []
    for index, part in enumerate(text.split(",")):
        match = re.fullmatch(r"([1-9][0-9]{0,9}(?:x[1-9][0-9]{0,9}){0,7})(?::(\w+))?", part.strip())
        if match is None or (match[2] or "fp32") not in _DTYPES:
            raise UsageError(
                "cannot read the input shape",
                got=repr(part),
                wanted=f"such as 1x3x224x224 or 2x16:int64 (types: {', '.join(_DTYPES)})",
            )
        shape = tuple(int(n) for n in match[1].split("x"))
        if math.prod(shape) > MAX_VALUES:
            raise UsageError(
                "the input is too large", got=repr(part), wanted=f"{MAX_VALUES} values"
            )
        tensors.append(random_tensor(shape, _DTYPES[match[2] or "fp32"], seed + index, high))
    return Inputs(tuple(tensors), {}, f"random, {text}")


def from_npz(path: str | Path, model: nn.Module | None = None) -> Inputs:
    """The arrays of an .npz file: by argument name, or, for ``arr_0``, ``arr_1`` or one array of
    any name, by position. The first dimension is the sample and is the same for all.

    Raises :class:`~qkit.errors.InputError` for a file that cannot be read or holds objects, empty
    arrays, NaN or infinity, or names that ``model.forward`` does not have.
    """
    try:
        arrays = None
        with open(path, "rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if isinstance(file, np.lib.npyio.NpzFile):
                arrays = {name: file[name] for name in file.files}
                if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                    arrays = None  # some other zip archive: numpy gives its members as bytes
    except Exception as error:  # numpy raises many kinds for a file that is not one of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"cannot read the data: {first}", where=str(path), wanted="an .npz file"
        ) from error
    if arrays is None:
        raise InputError("not an .npz file", where=str(path), fix="numpy.savez(path, input=array)")
    if not arrays:
        raise InputError("the file holds no arrays", where=str(path))
    tensors = {name: _checked(name, array, str(path)) for name, array in arrays.items()}
    sizes = {name: t.shape[0] for name, t in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise InputError("the arrays hold different numbers of samples", where=str(path), got=sizes)
    origin = f"{Path(path).name}, {next(iter(sizes.values()))} samples"
    if list(tensors) == [f"arr_{i}" for i in range(len(tensors))]:
        return Inputs(tuple(tensors.values()), {}, origin)
    names = _arguments(model) if model is not None else None
    unknown = [name for name in tensors if names is not None and name not in names]
    if len(tensors) == 1 and (names is None or unknown):
        return Inputs(tuple(tensors.values()), {}, origin)
    if unknown:
        raise InputError(
            "the model's forward has no such argument",
            where=str(path),
            got=", ".join(unknown),
            wanted=", ".join(names or []),
        )
    return Inputs((), tensors, origin)


def _checked(name: str, array: np.ndarray, where: str) -> Tensor:
    where = f"{where}: {name}"
    if array.dtype.kind not in "fiub":
        raise InputError("the array does not hold numbers", where=where, got=array.dtype)
    if array.size == 0 or array.ndim == 0:
        raise InputError("the array is empty", where=where, got=f"shape {array.shape}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):  # told below
            array = array.astype(np.float32)  # float64 is numpy's default, no model's
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(
            "the array is not finite", where=where, got=f"{bad} NaN or infinite values"
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        if array.max() > np.iinfo(np.int64).max:
            raise InputError("the array's values do not fit int64", where=where, got=array.max())
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _arguments(model: nn.Module) -> list[str] | None:
    """The named arguments of ``model.forward``; None where it takes any."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return named or None
    return named


def as_example(inputs: Inputs, example: Inputs | None, model: nn.Module) -> Inputs:
    """``inputs`` by position where ``example`` has all of them so: programs take them as they were
    captured."""
    names = _arguments(model)
    if example is None or example.kwargs or names is None or set(inputs.kwargs) != set(names):
        return inputs
    ordered = tuple(inputs.kwargs[name] for name in names)
    return dataclasses.replace(inputs, args=ordered, kwargs={})


def leading(inputs: Inputs) -> int:
    """The number of samples of a batch: the leading size of the first tensor that has one."""
    return next((t.shape[0] for t in (*inputs.args, *inputs.kwargs.values()) if t.dim()), 0)


def split(inputs: Inputs, n: int) -> Inputs:
    """The first ``n`` samples: of every tensor that has the leading size of the first one."""
    return next(batches(inputs, n), inputs)


def batches(inputs: Inputs, n: int) -> Iterator[Inputs]:
    """``inputs`` cut into batches of ``n`` samples, the last one as short as it must be."""
    tensors = [*inputs.args, *inputs.kwargs.values()]
    samples = leading(inputs)
    for start in range(0, samples, n):
        part = slice(start, start + n)
        cut = [t[part] if t.dim() and t.shape[0] == samples else t for t in tensors]
        args, rest = cut[: len(inputs.args)], cut[len(inputs.args) :]
        kwargs = dict(zip(inputs.kwargs, rest, strict=True))
        yield dataclasses.replace(inputs, args=tuple(args), kwargs=kwargs)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors of ``model(*args, **kwargs)``, flattened in a fixed order; no gradients.

    Raises :class:`~qkit.errors.InputError`, with the inputs' shapes, if the model raises.
    """
    try:
        with torch.no_grad():
            output = model(*inputs.args, **inputs.kwargs)
    except Exception as error:  # the model's own code
        lines = str(error).strip().splitlines() or [""]
        shapes = [f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in inputs.args]
        shapes += [f"{n} {tuple(t.shape)} {str(t.dtype)[6:]}" for n, t in inputs.kwargs.items()]
        raise InputError(
            f"the model fails on the inputs: {type(error).__name__}: {lines[0][:200]}",
            got=", ".join(shapes),
            where=inputs.origin,
            fix="--input or --calib with what the model takes",
        ) from error
    tensors = list(flatten(output))
    if not tensors:
        raise InputError("the model returned no tensor", got=type(output).__name__)
    return tensors


def flatten(value: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # also the outputs of transformers
        for below in value.values():
            yield from flatten(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from flatten(below)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from flatten(getattr(value, field.name))
