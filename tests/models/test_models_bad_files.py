"""Files that are no model: one line that names the file, exit code 3, and never a traceback."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qkit.errors import InputError
from qkit.models import load, sniff

OTHERS = {
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a model"),
    "text": (b"hello, world\n" * 10, "a text file"),
    "json": (b'{"a": 1, "b": [1, 2, 3]}' * 4, "a text file"),
    "html": (b"<!doctype html><html></html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "onnx": (b"\x08\x08\x12\x07pytorch" + bytes(50), "ONNX"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(50), "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "NumPy"),
    "zeros": (bytes(1000), "unknown format"),
    "one byte": (b"P", "not a model"),
    "zip magic": (b"PK", "truncated or corrupt"),
    "zip start": (b"PK\x03\x04" + bytes(60), "truncated or corrupt"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files(tools, tmp_path, name):
    data, words = OTHERS[name]
    (tmp_path / "file.bin").write_bytes(data)
    assert words in tools.refuses(tmp_path / "file.bin")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(tools, tmp_path, seed):
    data = np.random.default_rng(seed).bytes(500)
    (tmp_path / "file.bin").write_bytes(data)
    tools.refuses(tmp_path / "file.bin")


def test_a_path_that_is_not_there(tools, tmp_path):
    assert "no such file" in tools.refuses(tmp_path / "none.pt")


def test_a_folder_that_is_no_model(tools, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no model" in tools.refuses(tmp_path)


def test_a_folder_that_is_quantized(tools, tmp_path):
    (tmp_path / "qkit.json").write_text("{}")
    assert "quantized already" in tools.refuses(tmp_path)


def test_a_file_that_cannot_be_read(tools, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"x")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    assert "Permission denied" in tools.refuses(path)


# Truncated


@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "program", "safetensors"])
def test_truncated(tools, mlp, tmp_path, kind):
    path = tmp_path / "a.pt2"
    if kind == "script":
        tools.save_script(mlp, path)
    elif kind == "program":
        tools.save_program(mlp, path, torch.randn(2, 33))
    elif kind == "safetensors":
        save_file(mlp.state_dict(), path)
    else:
        torch.save(mlp, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    size = len(data)
    for cut in {1, 2, 8, 9, 20, 64, 65, 300, size // 2, size - 100, size - 22, size - 4, size - 1}:
        path.write_bytes(data[:cut])
        tools.refuses(path)


# safetensors


def write_header(path, header: object, data: bytes = bytes(64), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, shape=(4, 4), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_header_that_is_right(tmp_path):
    write_header(tmp_path / "a.safetensors", {"fc.weight": entry(0, 64)})
    assert load(tmp_path / "a.safetensors").state_dict["fc.weight"].shape == (4, 4)


HEADERS = {
    "overlap": {"a": entry(0, 64), "b": entry(0, 64)},
    "partial overlap": {"a": entry(0, 64), "b": entry(32, 96)},
    "beyond the end": {"a": entry(0, 128, (8, 4))},
    "a gap": {"a": entry(16, 64, (3, 4))},
    "another size": {"a": entry(0, 64, (5, 4))},
    "a huge shape": {"a": entry(0, 64, (1 << 62, 1 << 62))},
    "backwards": {"a": entry(64, 0)},
    "negative": {"a": entry(-64, 0)},
    "an unknown type": {"a": entry(0, 64, dtype="F999")},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 64]}},
    "text": {"a": "b"},
    "not json": b'{"a": ',
    "not text": b'{"\xff\xfe": 1}',
    "no tensors": {"__metadata__": {"format": "pt"}},
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(tools, tmp_path, name):
    write_header(tmp_path / "a.safetensors", HEADERS[name])
    tools.refuses(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_lengths_of_safetensors(tools, tmp_path, length):
    write_header(tmp_path / "a.safetensors", {"a": entry(0, 64)}, length=length)
    tools.refuses(tmp_path / "a.safetensors")


def test_sniffing_reads_no_more_than_it_needs(tmp_path):
    """A sparse file of a terabyte: none of it may be read."""
    with (tmp_path / "a.safetensors").open("wb") as file:
        text = json.dumps({"a": entry(0, 64)}).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(1 << 40)
    assert sniff(tmp_path / "a.safetensors") == "safetensors"


def test_the_error_keeps_its_cause(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "a.pt")
    assert caught.value.__cause__ is not None
