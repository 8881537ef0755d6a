"""What kind of model file this is, by its content. Nothing is unpickled or executed here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from qkit.errors import InputError

PICKLE, LEGACY, TORCHSCRIPT = "pickle-zip", "pickle-legacy", "torchscript"
EXPORT, SAFETENSORS, FOLDER = "torch-export", "safetensors", "hf-folder"

WANTED = "a PyTorch model file, a safetensors file, or a Hugging Face folder"
# torch writes stored (uncompressed) entries; more than this is not one of its files.
MAX_EXPANSION, EXPANSION_SLACK = 4, 64 << 20
# PROTO 2, then torch's magic number 0x1950a86a20f9469cfc6c as a LONG1.
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
MAX_HEADER = 100 << 20

_OTHERS = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 (Keras) file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run: git lfs pull)"),
    (b"<!DOCTYPE", "an HTML page, not the file itself"),
    (b"<html", "an HTML page, not the file itself"),
    (b"\x08", "perhaps an ONNX file; qkit quantizes the PyTorch model that it came from"),
)


def sniff(path: str | Path) -> str:
    """The kind of the model at ``path``.

    One of ``pickle-zip`` and ``pickle-legacy`` (``torch.save``), ``torchscript``,
    ``torch-export``, ``safetensors`` and ``hf-folder``. Raises
    :class:`~qkit.errors.InputError` for what is missing, empty, truncated or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _sniff_folder(path)
    if not path.exists():
        raise InputError("no such file or folder", where=str(path))
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    if not head:
        raise InputError("the file is empty", where=str(path), wanted=WANTED)
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if head.startswith(LEGACY_MAGIC):
        return LEGACY
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= MAX_HEADER:
        if length + 8 > path.stat().st_size:
            raise InputError("the safetensors file is truncated", where=str(path))
        return SAFETENSORS
    raise InputError(
        f"not a model: {_guess(head)}",
        where=str(path),
        got=f"it starts with {head[:8]!r}",
        wanted=WANTED,
    )


def _guess(head: bytes) -> str:
    for magic, what in _OTHERS:
        if head.lower().startswith(magic.lower()):
            return what
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write"
    return "a text file" if head.isascii() and b"\0" not in head else "an unknown format"


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"the file is truncated or corrupt: {error}", where=str(path)) from error
    size = path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_EXPANSION * size + EXPANSION_SLACK:
        raise InputError(
            "the archive claims to unpack to far more than its size",
            where=str(path),
            got=f"{unpacked} bytes from {size}",
            fix="if it is genuine, save it again with torch.save",
        )
    # Readers disagree on which of two entries of one name they take.
    if len({entry.filename for entry in entries}) != len(entries):
        raise InputError("the archive holds two entries of one name", where=str(path))
    # Every kind has one top folder, of any name.
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "models/model.json" in names or {"serialized_exported_program.json"} & {
        entry.filename for entry in entries
    }:
        return EXPORT
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return TORCHSCRIPT
    if "data.pkl" in names:
        return PICKLE
    raise InputError("a zip archive, but not of a model", where=str(path), wanted=WANTED)


def _sniff_folder(path: Path) -> str:
    if (path / "qkit.json").is_file():
        raise InputError(
            "the folder is a qkit artifact: it is quantized already",
            where=str(path),
            fix="quantize the model that it was made from",
        )
    if weight_files(path):
        return FOLDER
    raise InputError(
        "the folder holds no model",
        where=str(path),
        wanted="model.safetensors or pytorch_model.bin",
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a Hugging Face folder's weights, shards checked against the index.

    Raises :class:`~qkit.errors.InputError` for an index that cannot be read, or names a shard
    that is not there.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            continue
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a shard's name is not a string")
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
            raise InputError(
                f"the index of the shards is corrupt: {error!r}"[:200], where=str(index)
            ) from error
        for name in names:
            if Path(name).name != name or "\\" in name or "\0" in name:
                raise InputError(
                    "a shard lies outside the folder", where=str(index), got=repr(name)
                )
            if not (folder / name).is_file():
                raise InputError("a shard is missing", where=str(folder / name))
        if names:
            return [folder / name for name in names]
    return []
