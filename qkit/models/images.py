"""Pictures in a folder as what image models take: resized, cropped and normalised.

The defaults are those of evaluation on ImageNet: the shorter side to 256 pixels (bilinear, which
averages when it shrinks), the middle 224 x 224, values in [0, 1], then the mean and the standard
deviation of each colour.
"""

from __future__ import annotations

import dataclasses
import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qkit.errors import InputError, MissingExtraError, UsageError, first_line, nearest

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Pillow's name of what is read, by the word of the option.
_COLORS = {"rgb": "RGB", "gray": "L"}
T = TypeVar("T")
# What Pillow would clip to 8 bits instead of scaling.
_DEEP = re.compile(r"[IF]")


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes a tensor ``[channels, crop, crop]``, and how many are taken.

    ``resize`` and ``crop`` are in pixels; ``mean`` and ``std`` have one value, or one for each
    channel; ``color`` is ``rgb`` or ``gray``; ``count`` pictures are drawn from the folder, the
    same ones each time.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    count: int = 512

    def __post_init__(self) -> None:
        if self.color not in _COLORS:
            raise UsageError("not a colour", got=self.color, wanted=", ".join(_COLORS))
        for name in ("resize", "crop", "count"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is not a size", got=getattr(self, name))
        if self.crop > self.resize:
            raise UsageError(
                "the crop is larger than the picture", got=self.crop, wanted=f"up to {self.resize}"
            )
        if min(self.std) <= 0:
            raise UsageError("a standard deviation is more than zero", got=self.std)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise UsageError(
                    f"{name} has another number of values than channels",
                    got=len(values),
                    wanted=f"1 or {self.channels}",
                )

    @property
    def channels(self) -> int:
        """Channels of a picture."""
        return 3 if self.color == "rgb" else 1


def parse_images(texts: Sequence[str]) -> ImageOptions:
    """The options that ``crop=32``, ``mean=0.5,0.5,0.5``, ... say; without them the defaults.

    Grey pictures have the mean of the colours' defaults, a crop without a size to resize to that of
    ImageNet's ratio (8:7). Raises :class:`~qkit.errors.UsageError` for anything else.
    """
    given: dict[str, Any] = {}
    defaults = ImageOptions()
    fields = [field.name for field in dataclasses.fields(defaults)]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in fields:
            raise UsageError(
                "not an option of pictures", got=repr(text), wanted=nearest(name, fields, 6)
            )
        try:
            if name in ("mean", "std"):
                given[name] = tuple(float(part) for part in value.split(","))
            else:
                given[name] = value if name == "color" else int(value)
        except ValueError as error:
            raise UsageError("not a number", got=repr(text)) from error
    if "crop" in given:
        given.setdefault("resize", round(given["crop"] * 8 / 7))
    if given.get("color") == "gray":
        for name in ("mean", "std"):
            values = getattr(defaults, name)
            given.setdefault(name, (round(sum(values) / len(values), 3),))
    return ImageOptions(**given)


def image_files(folder: str | Path) -> list[Path]:
    """The pictures in ``folder`` and below, by their suffix, in the order of their names.

    Raises :class:`~qkit.errors.InputError` if there is none.
    """
    root = Path(folder)
    try:
        found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise InputError(f"cannot read the folder: {error.strerror}", where=str(root)) from error
    if not found:
        raise InputError(
            "the folder holds no pictures", where=str(root), wanted=", ".join(sorted(SUFFIXES))
        )
    return found


def drawn(files: Sequence[T], count: int) -> list[T]:
    """``count`` of the ``files`` (or all), in an order that is random but the same each time.

    Folders are often sorted by class, so that the first files are all of one.
    """
    order = list(files)
    random.Random(0).shuffle(order)
    return order[:count]


def read_image(path: str | Path, options: ImageOptions) -> Tensor:
    """One picture as float32 ``[channels, crop, crop]``.

    Raises :class:`~qkit.errors.InputError` for a file that is no picture, is damaged, has more than
    8 bits for a colour, or claims a size that would fill the memory, and
    :class:`~qkit.errors.MissingExtraError` without Pillow.
    """
    image = _open(path, _COLORS[options.color])
    width, height = image.size
    short = min(width, height)
    scaled = (round(width * options.resize / short), round(height * options.resize / short))
    left, top = ((side - options.crop) // 2 for side in scaled)
    image = image.resize(scaled, resample=2)  # bilinear
    image = image.crop((left, top, left + options.crop, top + options.crop))
    values = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(
        options.crop, options.crop, options.channels
    )
    mean, std = torch.tensor(options.mean), torch.tensor(options.std)
    return ((values / 255 - mean) / std).permute(2, 0, 1).contiguous()


def _open(path: str | Path, mode: str) -> Any:
    """The decoded picture in the colours of ``mode``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "images", needed_for="reading pictures") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if _DEEP.match(image.mode):
                    raise InputError(
                        "the picture has more than 8 bits for a colour",
                        where=str(path),
                        got=image.mode,
                        fix="convert it, or give --calib FILE.npz",
                    )
                if "transparency" in image.info:  # Pillow warns of those as bytes
                    return image.convert("RGBA").convert(mode)
                return image.convert(mode)
    except InputError:
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise InputError(f"not a picture: {first_line(error)}", where=str(path)) from error
