"""Calibration data: streamed, from a file or a function, and refused when they are not right."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qkit.errors import InputError, MissingExtraError, UsageError
from qkit.flows.data import from_iterable, gathered, in_memory, open_data
from qkit.flows.pt2e import convert
from qkit.models import read_image


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def sizes(data) -> list[int]:
    return [len(batch.args[0]) if batch.args else 0 for batch in data.stream()]


def test_tensors_are_cut_into_batches_each_time_anew():
    data = in_memory(torch.randn(33, 3))
    assert data.samples == 33
    assert sizes(data) == sizes(data) == [8, 8, 8, 8, 1]
    assert sizes(data.rebatched(4)) == [4] * 8  # of a batch of 1, nothing is whole


def test_a_file_by_argument_name(folder, mlp):
    np.savez("data.npz", input=np.ones((9, 33), "f4"))
    data = open_data("data.npz", mlp)
    assert [list(batch.kwargs) for batch in data.stream()] == [["input"], ["input"]]


def test_a_function_of_batches(folder, mlp):
    Path("mine.py").write_text(
        "import torch\ndef batches():\n    for n in (3, 1, 7):\n        yield torch.randn(n, 33)\n"
    )
    data = open_data("mine.py:batches", mlp)
    assert sizes(data) == sizes(data) == [3, 1, 7]
    assert len(convert(mlp, "int8-static", data).chosen) == 2


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([torch.ones(0, 33)], "a batch is empty"),
        ([torch.ones(2, 33), torch.full((2, 33), torch.nan)], "not finite"),
        ([torch.ones(2, 33), torch.ones(2, 33, dtype=torch.int64)], "not like the first"),
        ([torch.ones(2, 33), {"input": torch.ones(2, 33)}], "not like the first"),
        ([torch.ones(2, 32)], "fails on the inputs"),
        ([torch.ones(2, 33), torch.ones(2, 31)], "fails on the inputs"),
        ([torch.ones(2, 33, dtype=torch.int64)], "fails on the inputs"),
        (["a path"], "a batch is a tensor"),
    ],
)
def test_wrong_batches(mlp, batches, message):
    with pytest.raises(InputError, match=message) as caught:
        convert(mlp, "int8-static", from_iterable(lambda: batches, "mine:batches"))
    assert caught.value.exit_code == 3
    assert "mine:batches" in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.ones((2, 33), "f4"), "label": np.ones(2, "i8")}, "no such argument"),
        ({"input": np.ones((0, 33), "f4")}, "empty"),
        ({"input": np.full((2, 33), np.nan, "f4")}, "not finite"),
        ({"input": np.array(["a"])}, "does not hold numbers"),
    ],
)
def test_wrong_files(folder, mlp, arrays, message):
    np.savez("data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_data("data.npz", mlp)


@pytest.mark.parametrize("text", ["return 7", "yield torch.ones(2, 33); raise OSError('gone')"])
def test_a_function_that_fails(folder, mlp, text):
    Path("mine.py").write_text(f"import torch\ndef batches():\n    {text}\n")
    with pytest.raises(InputError, match=r"function of batches fails: (Type|OS)Error") as caught:
        convert(mlp, "int8-static", open_data("mine.py:batches", mlp))
    assert "mine.py:batches" in str(caught.value)


def test_wrong_sources(folder, mlp):
    with pytest.raises(InputError, match="cannot read"):
        open_data("missing.npz", mlp)
    with pytest.raises(UsageError, match="cannot import"):
        open_data("missing_module:batches", mlp)
    with pytest.raises(InputError, match="no pictures"):
        open_data(str(folder), mlp)
    with pytest.raises(UsageError, match="--image is for a folder"):
        open_data("data.npz", mlp, ["crop=3"])


def test_a_folder_of_pictures_is_streamed(folder, cnn, monkeypatch):
    for index in range(11):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), "u1")
        Image.fromarray(pixels).save(folder / f"{index}.png")
    opened = []
    monkeypatch.setattr(
        "qkit.flows.data.read_image", lambda *each: opened.append(each) or read_image(*each)
    )
    data = open_data(".", cnn, ["crop=16", "count=10"])
    assert data.samples == 10
    assert not opened
    assert data.first().args[0].shape == (8, 3, 16, 16)
    assert len(opened) == 8
    assert "10 of 11 pictures, 3x16x16" in data.origin
    assert sizes(data) == [8, 2]
    assert len(convert(cnn, "int8-static", data).chosen) == 3
    (folder / "3.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"3\.png"):
        convert(cnn, "int8-static", open_data(".", cnn, ["crop=16"]))


def test_all_samples_as_one_batch(folder, mlp):
    np.savez("data.npz", input=np.arange(21 * 33, dtype="f4").reshape(21, 33))
    assert gathered("data.npz", mlp).kwargs["input"].flatten().tolist() == list(range(21 * 33))
    Path("many.py").write_text(
        "import torch\ndef batches():\n    for n in range(1000):\n        yield torch.ones(9, 33)\n"
    )
    assert gathered("many.py:batches", mlp).args[0].shape == (1024, 33)


def test_a_fixed_batch_uses_whole_batches_only():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.reshape(8, 6))

    done = convert(Fixed().eval(), "int8-static", torch.randn(17, 6))
    assert "fixed at 8" in done.captured.notes[0]
    assert done.module(torch.randn(8, 6)).shape == (8, 3)


def test_missing_torchao_is_told_before_any_work(mlp, monkeypatch):
    monkeypatch.setattr("qkit.report.package_version", lambda name: None)
    with pytest.raises(MissingExtraError, match="torchao") as caught:
        convert(mlp, "int8-static", torch.randn(2, 33))
    assert caught.value.exit_code == 7
    assert "pip install 'qkit-torch[pt2e]'" in str(caught.value)


def test_damage_is_refused(mlp):
    mlp[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        convert(mlp, "int8-static", torch.randn(2, 33))
    with pytest.raises(InputError, match="meta device"):
        convert(mlp.to("meta"), "int8-static", torch.randn(2, 33))


def test_the_model_is_left_as_it_was(mlp):
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    mlp.train()
    convert(mlp, "int8-static", torch.randn(9, 33))
    assert mlp.training
    assert all(torch.equal(before[name], tensor) for name, tensor in mlp.state_dict().items())


def test_progress_counts_samples(mlp):
    seen = []
    convert(mlp, "int8-static", torch.randn(17, 33), progress=lambda *each: seen.append(each))
    assert [done for done, *_ in seen] == [8, 16, 17]
    assert {total for _, total, _ in seen} == {17}
