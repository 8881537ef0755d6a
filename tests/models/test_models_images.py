"""Pictures as tensors: sizes and values against torch and numpy; what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qkit.errors import InputError, MissingExtraError, UsageError
from qkit.models import ImageOptions, drawn, image_files, parse_images, read_image

PLAIN = {"mean": (0.0,), "std": (1.0,)}


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without sharp edges, uint8 ``[height, width, channels]``."""
    coarse = torch.rand(1, channels, 5, 7)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (fine[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def save(path: Path, array: np.ndarray, mode: str = "RGB") -> Path:
    Image.fromarray(array[..., 0] if mode == "L" else array).save(path)
    return path


@pytest.mark.parametrize(("height", "width"), [(60, 90), (91, 60)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path, height, width):
    array = smooth(height, width)
    options = ImageOptions(resize=32, crop=27, **PLAIN)
    found = read_image(save(tmp_path / "a.png", array), options)
    assert found.shape == (3, 27, 27)
    assert found.dtype == torch.float32
    size = [round(side * 32 / min(height, width)) for side in (height, width)]
    x = torch.from_numpy(array).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
    top, left = ((side - 27) // 2 for side in size)
    wanted = wanted[0, :, top : top + 27, left : left + 27] / 255
    # Pillow rounds to whole values after each of its two passes.
    assert (found - wanted).abs().max() <= 1.5 / 255


def test_values_are_normalised_by_channel(tmp_path):
    array = smooth(16, 16)
    options = ImageOptions(resize=16, crop=16)
    found = read_image(save(tmp_path / "a.png", array), options)
    for channel, (mean, std) in enumerate(zip(options.mean, options.std, strict=True)):
        wanted = (array[..., channel].astype("f4") / np.float32(255) - mean) / std
        np.testing.assert_allclose(found[channel].numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_kinds_of_pictures(tmp_path, mode):
    image = Image.fromarray(smooth(16, 16)).convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (path,) = image_files(tmp_path)
    assert read_image(path, ImageOptions(resize=16, crop=16)).shape == (3, 16, 16)
    gray = ImageOptions(resize=16, crop=16, color="gray", **PLAIN)
    assert read_image(path, gray).shape == (1, 16, 16)


def test_files_are_found_below_and_drawn_the_same_way(tmp_path):
    for name in ("b/1.JPG", "a/2.png", "a/1.png", "a/notes.txt", "c/d/3.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files = image_files(tmp_path)
    assert [str(f.relative_to(tmp_path)) for f in files] == [
        *("a/1.png", "a/2.png", "b/1.JPG", "c/d/3.webp")
    ]
    assert drawn(files, 3) == drawn(files, 3)
    assert drawn(files, 3) == drawn(files, 4)[:3]
    assert sorted(drawn(files, 99)) == files


def test_options_as_text():
    assert parse_images([]) == ImageOptions()
    given = parse_images(["crop=28", "color=gray", "count=7"])
    assert (given.resize, given.crop, given.channels, given.count) == (32, 28, 1, 7)
    assert given.mean == (0.449,)
    assert parse_images(["mean=0.5,0.5,0.5", "std=0.5"]).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=3", "not an option"),
        ("crop", "not a number"),
        ("crop=x", "not a number"),
        ("crop=0", "not a size"),
        ("resize=100", "larger than"),
        ("color=cmyk", "not a colour"),
        ("std=0,1,1", "more than zero"),
        ("mean=1,2", "number of values"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises(UsageError, match=message):
        parse_images([text])


def test_damaged_files_are_refused_by_name(tmp_path):
    options = ImageOptions(resize=16, crop=16)
    whole = save(tmp_path / "whole.png", smooth(64, 64)).read_bytes()
    for name, content in {"cut.png": whole[: len(whole) // 2], "text.jpg": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"not a picture.*" + name) as caught:
            read_image(tmp_path / name, options)
        assert caught.value.exit_code == 3
    Image.fromarray(np.full((16, 16), 40000, "u2")).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png", options)


def test_a_picture_that_claims_to_be_huge_is_not_unpacked(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", smooth(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(InputError, match="decompression bomb"):
        read_image(path, ImageOptions(resize=16, crop=16))


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(InputError, match="no pictures"):
        image_files(tmp_path)


def test_missing_pillow_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="pillow") as caught:
        read_image(tmp_path / "a.png", ImageOptions())
    assert caught.value.exit_code == 7
    assert "pip install 'qkit-torch[images]'" in str(caught.value)
