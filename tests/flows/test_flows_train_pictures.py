"""Training on folders of pictures, one for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qkit.errors import InputError, UsageError
from qkit.flows.compress import CompressRequest, compress_file
from qkit.flows.train import TrainOptions, evaluate, open_train, train

IMAGES = ("crop=8", "resize=8", "mean=0.5", "std=0.5")


def pictures(root: Path, classes: dict[str, int], count: int = 12) -> Path:
    """Noise with one channel brighter than the others; a folder of each class has one below it."""
    rng = np.random.default_rng(len(classes))
    for name, channel in classes.items():
        for index in range(count):
            array = rng.integers(0, 120, (10, 9, 3))
            array[..., channel] += 100
            path = root / name / ("more" if index % 2 else "") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype("u1")).save(path)
    return root


COLORS = {"b-red": 0, "a-green": 1, "c-blue": 2}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 3))  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "train", COLORS)


def test_labels_are_the_folders_in_their_order(folder):
    data = open_train(str(folder), images=IMAGES)
    assert (data.samples, data.classes) == (36, ("a-green", "b-red", "c-blue"))
    brightest = {0: 1, 1: 0, 2: 2}
    seen = []
    for batch in data.epoch(0, 0, 5, shuffle=True):
        (x,) = batch.inputs.args
        assert x.shape[1:] == (3, 8, 8)
        for picture, label in zip(x, batch.targets.tolist(), strict=True):
            assert int(picture.mean((1, 2)).argmax()) == brightest[label]
            seen.append(label)
    assert sorted(seen) == [0] * 12 + [1] * 12 + [2] * 12
    assert seen != sorted(seen)
    again = [b.targets.tolist() for b in data.epoch(0, 0, 5, shuffle=True)]
    assert [label for labels in again for label in labels] == seen
    assert open_train(str(folder), images=[*IMAGES, "count=7"]).samples == 7


def test_a_model_learns_from_them(folder, tmp_path):
    val = open_train(str(pictures(tmp_path / "val", COLORS, 4)), images=IMAGES)
    model = net()
    options = TrainOptions(epochs=12, lr=0.03, batch_size=12)
    train(model, open_train(str(folder), images=IMAGES), val=val, options=options)
    assert evaluate(model, val)["accuracy"] > 80  # of 33


def test_a_recipe_reads_them(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "net.pt")
    Path("recipe.yaml").write_text(
        "steps: [{train: {epochs: 12, lr: 0.03, batch_size: 12}}, {quantize: {}}]\n"
        f"data: train\nval: train\ncalib: train\nimage: {list(IMAGES)}\n"
    )
    ledger = compress_file(CompressRequest("recipe.yaml", "net.pt", "out"))
    assert ledger.rows[2].metrics["accuracy"] > 80


def test_what_is_no_such_folder(folder, tmp_path):
    with pytest.raises(InputError, match="does not tell classes"):
        open_train(str(folder / "a-green"))
    other = pictures(tmp_path / "other", {"a-green": 1, "d-gray": 0})
    with pytest.raises(InputError, match="other classes than the training data"):
        train(net(), open_train(str(folder), images=IMAGES), val=open_train(str(other)))
    (other / "e-empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        open_train(str(other))
    (folder / "a-green" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"not a picture"):
        list(open_train(str(folder), images=IMAGES).epoch(0, 0, 64, shuffle=False))
    with pytest.raises(UsageError, match="not an option of pictures"):
        open_train(str(folder), images=["size=3"])
