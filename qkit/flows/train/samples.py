"""Training data: batches of inputs with targets, made anew in each epoch and checked.

A batch of a stream is what all processes take together: each has its own part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qkit.errors import InputError, users_code
from qkit.flows.data import tensors_of
from qkit.flows.evaluate import AnyInputs, as_inputs
from qkit.models import Inputs, leading

# The array of an .npz file, or the key of a batch, that holds the targets.
LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and what it should answer (None: nothing is known); what a
    teacher ``taught`` about it, where that is stored."""

    inputs: Inputs
    targets: Tensor | None
    taught: Tensor | None = None

    def __len__(self) -> int:
        return leading(self.inputs)

    def part(self, indices: Tensor | slice) -> Batch:
        """Some of the samples."""

        def take(t: Tensor) -> Tensor:
            return t[indices] if t.dim() and t.shape[0] == len(self) else t

        return self._map(take)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        args = tuple(map(change, self.inputs.args))
        kwargs = {name: change(t) for name, t in self.inputs.kwargs.items()}
        targets = None if self.targets is None else change(self.targets)
        taught = None if self.taught is None else change(self.taught)
        return Batch(replace(self.inputs, args=args, kwargs=kwargs), targets, taught)


@dataclass(frozen=True)
class TrainData:
    """``stream(epoch, seed, size, shuffle)`` makes the batches of an epoch, of ``size`` samples if
    the data do not come in batches already. ``samples`` and ``batches`` where they are known;
    ``classes`` are the names of what the targets number, where the data tell them."""

    origin: str
    stream: Callable[[int, int, int, bool], Iterator[Batch]]
    samples: int | None = None
    batches: int | None = None
    in_memory: bool = False
    classes: tuple[str, ...] | None = None

    def length(self, size: int) -> int | None:
        """The number of batches of an epoch, if it is known."""
        return self.batches if self.samples is None else -(-self.samples // size)

    def epoch(self, epoch: int, seed: int, size: int, *, shuffle: bool) -> Iterator[Batch]:
        """The batches of ``epoch``, each one checked.

        Raises :class:`~qkit.errors.InputError` for a batch that is empty or not finite, or whose
        tensors hold different numbers of samples, and if there is none.
        """
        number = -1
        for number, batch in enumerate(self.stream(epoch, seed, size, shuffle)):
            yield _checked(batch, f"{self.origin}, batch {number}")
        if number < 0:
            raise InputError("the training data are empty", where=self.origin)


def labelled(
    inputs: AnyInputs,
    targets: Tensor | None,
    origin: str | None = None,
    taught: Tensor | None = None,
) -> TrainData:
    """Samples in memory: ``inputs`` as in :func:`qkit.quantize`, and their ``targets``.

    Raises :class:`~qkit.errors.InputError` for what :meth:`TrainData.epoch` refuses, of all.
    """
    given = as_inputs(inputs)
    name = origin or given.origin
    whole = _checked(Batch(given, targets, taught), name)

    def stream(epoch: int, seed: int, size: int, shuffle: bool) -> Iterator[Batch]:
        for indices in order_of(len(whole), epoch, seed, shuffle=shuffle).split(size):
            yield whole.part(indices)

    return TrainData(name, stream, samples=len(whole), in_memory=True)


def order_of(count: int, epoch: int, seed: int, *, shuffle: bool) -> Tensor:
    """The order of ``count`` samples in an epoch."""
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=_generator(seed, epoch))


def stream_of(make: Callable[[], Any], origin: str) -> TrainData:
    """What ``make()`` returns: an iterable of batches (called once for each epoch), a torch
    ``Dataset`` of samples, or a pair of tensors with all of them.

    A batch is ``(inputs, targets)``, ``(input, input, ..., targets)``, or a mapping by argument
    names with the targets under one of :data:`LABELS`; a lone tensor has no targets.
    """
    with users_code("the function of training data", where=origin):
        first = make()
    if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], Tensor):
        return labelled(first[0], first[1], origin)
    if isinstance(first, Dataset) and not isinstance(first, IterableDataset):
        return _of_dataset(first, origin)
    if not isinstance(first, Iterable):
        raise InputError(
            "no training data", where=origin, got=type(first).__name__,
            wanted="an iterable of batches, a torch Dataset, or a pair (inputs, targets)",
        )  # fmt: skip

    def stream(epoch: int, seed: int, size: int, shuffle: bool) -> Iterator[Batch]:
        with users_code("the function of training data", where=origin):
            for given in make():  # anew for each pass: it may be one that is used up
                yield as_batch(given, origin)

    return TrainData(origin, stream, batches=len(first) if isinstance(first, Sized) else None)


def _of_dataset(dataset: Dataset, origin: str) -> TrainData:
    def stream(epoch: int, seed: int, size: int, shuffle: bool) -> Iterator[Batch]:
        loader: DataLoader = DataLoader(
            dataset, size, shuffle=shuffle, generator=_generator(seed, epoch)
        )
        for given in loader:
            yield as_batch(given, origin)

    return TrainData(origin, stream, samples=len(dataset))  # type: ignore[arg-type]


def as_batch(given: Any, origin: str) -> Batch:
    """A batch from what a stream yields (:func:`stream_of`)."""
    if isinstance(given, Batch):
        return given
    if isinstance(given, Tensor | Inputs):
        return Batch(replace(as_inputs(given), origin=origin), None)
    if isinstance(given, Mapping):
        name = next((each for each in LABELS if each in given), None)
        inputs = {key: value for key, value in given.items() if key != name}
        targets = None if name is None else given[name]
    elif isinstance(given, Sequence) and len(given) > 1:
        *args, targets = given
        inputs = args[0] if len(args) == 1 else args  # type: ignore[assignment]
    else:
        raise InputError(
            "a batch is (inputs, targets), or a mapping of tensors by argument name",
            where=origin,
            got=type(given).__name__,
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise InputError("targets are a tensor", where=origin, got=type(targets).__name__)
    return Batch(replace(as_inputs(inputs), origin=origin), targets)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(seed, epoch))


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % (1 << 31)
    return value


def _checked(batch: Batch, where: str) -> Batch:
    tensors = tensors_of(batch.inputs)
    if batch.targets is not None:
        tensors = tensors | {"targets": batch.targets}
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise InputError("the training data are empty", where=f"{where}: {name}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                "the training data are not finite",
                where=f"{where}: {name}",
                got=f"{bad} NaN or infinite values",
            )
    targets = batch.targets
    if targets is not None and (not targets.dim() or targets.shape[0] != len(batch)):
        raise InputError(
            "the targets hold another number of samples than the inputs",
            where=where,
            got=f"targets {tuple(targets.shape)}",
            wanted=f"{len(batch)} of them",
        )
    whole = targets is not None and not (targets.is_floating_point() or targets.is_complex())
    if targets is not None and whole and targets.dtype != torch.int64:
        return replace(batch, targets=targets.long())  # the one type that torch's losses take
    return batch
