"""What ``--train`` names: a file of arrays, a folder of pictures by class, or a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.flows.train.samples import LABELS, Batch, TrainData, labelled, order_of, stream_of
from qkit.models import (
    Inputs,
    drawn,
    from_npz,
    image_files,
    parse_images,
    read_image,
    resolve_callable,
)


def open_train(
    text: str, model: torch.nn.Module | None = None, images: Sequence[str] = ()
) -> TrainData:
    """The data that ``--train`` names: ``FILE.npz`` with the inputs and an array of
    :data:`LABELS`, a folder with a folder of pictures for each class, or ``module:function``, as
    in :func:`stream_of`. ``images`` say how pictures are read (:func:`qkit.models.parse_images`).

    Raises what :func:`qkit.models.from_npz` and :func:`labelled_pictures` raise, and
    :class:`~qkit.errors.UsageError` for a function that cannot be found.
    """
    if Path(text).is_dir():
        return labelled_pictures(text, images)
    if ":" in text and not Path(text).exists():
        return stream_of(resolve_callable(text), text)
    return labelled(*labels_from_npz(text, model), text)


def labels_from_npz(text: str, model: torch.nn.Module | None) -> tuple[Inputs, Tensor]:
    """The inputs of an .npz file, and the array with their targets."""
    found = from_npz(text)
    name = next((each for each in LABELS if each in found.kwargs), None)
    if name is None:
        raise InputError(
            "the file has no targets", where=text,
            got=", ".join(found.kwargs) or "arrays without names",
            wanted=f"the inputs, and an array called {', '.join(LABELS[:-1])} or {LABELS[-1]}",
        )  # fmt: skip
    rest = {key: tensor for key, tensor in found.kwargs.items() if key != name}
    inputs = replace(found, kwargs=rest)
    if len(rest) == 1:  # one array may have any name, as elsewhere
        inputs = replace(found, args=tuple(rest.values()), kwargs={})
    return inputs, found.kwargs[name]


def labelled_pictures(folder: str | Path, images: Sequence[str] = ()) -> TrainData:
    """The pictures in ``folder/CLASS/`` (and below), read a batch at a time; the targets number the
    classes in the order of their names. All of them, unless ``images`` say ``count=N``.

    Raises :class:`~qkit.errors.InputError` where there are not at least two classes, or one has no
    pictures, and, when it is read, for a picture that is damaged.
    """
    root, options = Path(folder), parse_images(images)
    inside = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(inside) < 2:
        raise InputError(
            "the folder does not tell classes",
            where=str(root),
            got=", ".join(p.name for p in inside) or "no folders in it",
            wanted="a folder for each class, with its pictures",
        )
    samples = [(path, number) for number, p in enumerate(inside) for path in image_files(p)]
    if any(text.startswith("count=") for text in images):
        samples = drawn(samples, options.count)
    size = f"{options.channels}x{options.crop}x{options.crop}"
    origin = f"{root.name}, {len(samples)} pictures of {len(inside)} classes, {size}"

    def stream(epoch: int, seed: int, size: int, shuffle: bool) -> Iterator[Batch]:
        for part in order_of(len(samples), epoch, seed, shuffle=shuffle).split(size):
            chosen = [samples[index] for index in part.tolist()]
            pictures = torch.stack([read_image(path, options) for path, _ in chosen])
            yield Batch(Inputs((pictures,), {}, origin), torch.tensor([n for _, n in chosen]))

    classes = tuple(p.name for p in inside)
    return TrainData(origin, stream, samples=len(samples), classes=classes)
