"""Calibration data as a stream of batches: an .npz file, a function of the user's, or tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.flows.evaluate import AnyInputs, as_inputs
from qkit.models import Inputs, batches, from_npz, leading, resolve_callable, split

BATCH = 8


@dataclass(frozen=True)
class Data:
    """Batches that are made anew each time they are asked for; ``samples`` where known."""

    origin: str
    stream: Callable[[], Iterator[Inputs]]
    samples: int | None = None

    def first(self) -> Inputs:
        """The first batch. Raises :class:`~qkit.errors.InputError` if there is none."""
        return self._next(self.stream())

    def head(self, samples: int) -> Inputs:
        """The first ``samples`` as one batch, or as many as there are in batches that fit together.

        Raises what :meth:`first` raises.
        """
        stream = self.stream()
        found = self._next(stream)
        while leading(found) < samples and (more := next(stream, None)) is not None:
            joined = _join(found, more)
            if joined is None:
                break
            found = joined
        return split(found, samples)

    def _next(self, stream: Iterator[Inputs]) -> Inputs:
        found = next(stream, None)
        if found is None:
            raise InputError("the calibration data are empty", where=self.origin)
        return found

    def rebatched(self, size: int) -> Data:
        """The same samples in batches of exactly ``size``; what is left over is not used."""

        def stream() -> Iterator[Inputs]:
            for given in self.stream():
                for batch in batches(given, size):
                    if leading(batch) == size:
                        yield batch

        return replace(self, stream=stream)


def _join(a: Inputs, b: Inputs) -> Inputs | None:
    """Both batches as one; None where they differ in more than their number of samples."""
    pairs = list(zip(tensors_of(a).values(), tensors_of(b).values(), strict=True))
    if any(x.dim() == 0 or x.shape[1:] != y.shape[1:] for x, y in pairs):
        return None
    if any(len(x) != leading(a) or len(y) != leading(b) for x, y in pairs):
        return None
    both = [torch.cat(pair) for pair in pairs]
    args, rest = both[: len(a.args)], both[len(a.args) :]
    return replace(a, args=tuple(args), kwargs=dict(zip(a.kwargs, rest, strict=True)))


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of ``inputs`` by place or name."""
    return {str(i): t for i, t in enumerate(inputs.args)} | inputs.kwargs


def in_memory(given: AnyInputs) -> Data:
    """Tensors that are there already."""
    inputs = as_inputs(given)
    return Data(inputs.origin, lambda: _checked(batches(inputs, BATCH)), leading(inputs))


def from_iterable(make: Callable[[], Iterable[Any]], origin: str) -> Data:
    """What ``make()`` yields: tensors, tuples or mappings of tensors, each one batch."""

    def stream() -> Iterator[Inputs]:
        for given in make():
            if not isinstance(given, Inputs | Tensor | tuple | list | dict):
                raise InputError(
                    "a batch is a tensor, or a tuple or dict of tensors",
                    where=origin,
                    got=type(given).__name__,
                )
            yield replace(as_inputs(given), origin=origin)

    return Data(origin, lambda: _checked(stream()))


def open_data(text: str, model: nn.Module | None = None) -> Data:
    """The data that ``--calib`` names: ``FILE.npz``, or ``module:function`` of batches.

    The function is called without arguments, once for each pass, and returns an iterable. Raises
    what :func:`qkit.models.from_npz` raises, and :class:`~qkit.errors.UsageError` for a function
    that cannot be found.
    """
    if ":" in text and not Path(text).exists():
        return from_iterable(resolve_callable(text), text)
    if Path(text).is_dir():
        raise UsageError(
            "the calibration data are a folder", got=text, wanted="FILE.npz or module:function"
        )
    return in_memory(from_npz(text, model))


def _checked(stream: Iterator[Inputs]) -> Iterator[Inputs]:
    """The batches, each one with the names and types of the first, not empty and finite."""
    wanted: dict[str, torch.dtype] | None = None
    for number, batch in enumerate(stream):
        tensors = tensors_of(batch)
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        wanted = wanted or kinds
        if kinds != wanted:
            raise InputError(
                "a batch is not like the first one",
                where=f"{batch.origin}, batch {number}",
                got=_show(kinds),
                wanted=_show(wanted),
            )
        for name, tensor in tensors.items():
            if not tensor.numel():
                raise InputError(
                    "a batch is empty", where=f"{batch.origin}: {name}, batch {number}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise InputError(
                    "a batch is not finite",
                    where=f"{batch.origin}: {name}, batch {number}",
                    got=f"{bad} NaN or infinite values",
                )
        yield batch


def _show(kinds: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in kinds.items())
