"""Calibration data as a stream of batches: a file, pictures, a function of the user's, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError, users_code
from qkit.flows.evaluate import AnyInputs, as_inputs
from qkit.models import (
    ImageOptions,
    Inputs,
    batches,
    drawn,
    from_npz,
    image_files,
    leading,
    parse_images,
    read_image,
    resolve_callable,
    split,
)

BATCH = 8
# Samples that are held in memory of data whose number is not known.
MAX_SAMPLES = 1024


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
        found = [self._next(stream)]
        count = leading(found[0])
        while count < samples and (more := next(stream, None)) is not None:
            if not _fit(found[0], more):
                break
            found.append(more)
            count += leading(more)
        return split(_join(found), samples)

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


def _fit(a: Inputs, b: Inputs) -> bool:
    """Whether both batches differ in nothing but their number of samples."""
    pairs = list(zip(tensors_of(a).values(), tensors_of(b).values(), strict=True))
    if any(x.dim() == 0 or x.shape[1:] != y.shape[1:] for x, y in pairs):
        return False
    return all(len(x) == leading(a) and len(y) == leading(b) for x, y in pairs)


def _join(parts: list[Inputs]) -> Inputs:
    """Batches that fit together as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    both = [torch.cat(each) for each in zip(*(tensors_of(p).values() for p in parts), strict=True)]
    args, rest = both[: len(first.args)], both[len(first.args) :]
    return replace(first, args=tuple(args), kwargs=dict(zip(first.kwargs, rest, strict=True)))


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of ``inputs`` by place or name."""
    return {str(i): t for i, t in enumerate(inputs.args)} | inputs.kwargs


def in_memory(given: AnyInputs) -> Data:
    """Tensors that are there already."""
    inputs = as_inputs(given)
    return Data(inputs.origin, lambda: _checked(batches(inputs, BATCH)), leading(inputs))


def from_iterable(make: Callable[[], Iterable[Any]], origin: str) -> Data:
    """What ``make()`` yields: tensors, tuples or mappings of tensors, each one batch.

    What it raises is an :class:`~qkit.errors.InputError`, as the data are the user's.
    """

    def stream() -> Iterator[Inputs]:
        with users_code("the function of batches", where=origin, wanted="an iterable of batches"):
            for given in make():
                if not isinstance(given, Inputs | Tensor | tuple | list | dict):
                    raise InputError(
                        "a batch is a tensor, or a tuple or dict of tensors",
                        where=origin,
                        got=type(given).__name__,
                    )
                yield replace(as_inputs(given), origin=origin)

    return Data(origin, lambda: _checked(stream()))


def from_images(folder: str | Path, options: ImageOptions | None = None) -> Data:
    """Pictures of a folder and those below it, read a batch at a time (:mod:`qkit.models.images`).

    Raises :class:`~qkit.errors.InputError` if there is none, or, when it is read, for one that is
    damaged.
    """
    options = options or ImageOptions()
    files = image_files(folder)
    chosen = drawn(files, options.count)
    size = f"{options.channels}x{options.crop}x{options.crop}"
    origin = f"{folder}, {len(chosen)} of {len(files)} pictures, {size}"

    def stream() -> Iterator[Inputs]:
        for start in range(0, len(chosen), BATCH):
            pictures = [read_image(path, options) for path in chosen[start : start + BATCH]]
            yield Inputs((torch.stack(pictures),), {}, origin)

    return Data(origin, lambda: _checked(stream()), len(chosen))


def open_data(text: str, model: nn.Module | None = None, images: Sequence[str] = ()) -> Data:
    """The data that ``--calib`` names: ``FILE.npz``, a folder of pictures, or ``module:function``.

    ``images`` say how pictures are read (:func:`qkit.models.parse_images`). The function is called
    without arguments, once for each pass, and returns an iterable of batches. Raises what
    :func:`qkit.models.from_npz` and :func:`from_images` raise, and
    :class:`~qkit.errors.UsageError` for a function that cannot be found.
    """
    if Path(text).is_dir():
        return from_images(text, parse_images(images))
    if images:
        raise UsageError("--image is for a folder of pictures", got=f"--calib {text}")
    if ":" in text and not Path(text).exists():
        return from_iterable(resolve_callable(text), text)
    return in_memory(from_npz(text, model))


def gathered(text: str, model: nn.Module | None = None, images: Sequence[str] = ()) -> Inputs:
    """All of :func:`open_data` in memory, of a function's batches the first :data:`MAX_SAMPLES`."""
    data = open_data(text, model, images)
    return data.head(data.samples or MAX_SAMPLES)


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
