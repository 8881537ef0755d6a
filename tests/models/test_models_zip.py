"""Archives that two readers could read in two ways, and archives that unpack to too much."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile

import pytest
import torch

from qkit.models import load, sniff


@pytest.fixture
def files(tools, mlp, tmp_path):
    paths = {kind: tmp_path / f"{kind}.pt2" for kind in ("pickle", "script", "program")}
    torch.save(mlp.state_dict(), paths["pickle"])
    tools.save_script(mlp, paths["script"])
    tools.save_program(mlp, paths["program"], torch.randn(2, 33))
    return paths


PICKLED = {
    "pickle": "data.pkl",
    "script": "data.pkl",
    "program": "data/sample_inputs/model.pt",
}


def append(path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of duplicates
        archive.writestr(name, data)


@pytest.mark.parametrize("kind", PICKLED)
def test_a_second_entry_of_the_same_name(tools, files, marker, kind):
    path = files[kind]
    top = zipfile.ZipFile(path).namelist()[0].partition("/")[0]
    evil = io.BytesIO()
    torch.save(tools.Trap(marker), evil)
    append(path, f"{top}/{PICKLED[kind]}", evil.getvalue())
    assert "two entries of one name" in tools.refuses(path)


@pytest.mark.parametrize(
    "name", ["data/SAMPLE_INPUTS/model.pt", "MODELS/model.json", "Models/Model.JSON"]
)
def test_a_program_with_entries_that_differ_in_case(tools, files, marker, name):
    """torch finds entries without regard to case."""
    path = files["program"]
    top = zipfile.ZipFile(path).namelist()[0].partition("/")[0]
    append(path, f"{top}/{name}", pickle.dumps(tools.Trap(marker)))
    tools.refuses(path)


@pytest.mark.parametrize("name", ["models/other.json", "models/model.jsox", "data/weights/model.pt",
                                  "data/constants/model.pt", "data/constants/custom_obj_0",
                                  "data/aotinductor/model/a.so", "DATA/weights/x.pt"])  # fmt: skip
def test_a_program_with_other_members(tools, files, marker, name):
    path = files["program"]
    tools.rewrite(path, {name: pickle.dumps(tools.Trap(marker))})
    assert "unknown member" in tools.refuses(path)


def test_a_program_with_a_second_top_folder(tools, files, marker):
    append(files["program"], "other/models/model.json", b"{}")
    tools.refuses(files["program"])


@pytest.mark.parametrize("name", ["serialized_exported_program.json", "serialized_state_dict.pt"])
def test_a_program_with_members_of_the_old_format(tools, files, marker, name):
    append(files["program"], name, pickle.dumps(tools.Trap(marker)))
    assert "--trust-pickle" in tools.refuses(files["program"])


def two_directories(harmless: bytes, evil: bytes) -> bytes:
    """One file whose end points at the directory of ``evil``, beside that of ``harmless``.

    zipfile takes the directory that stands right before the end; torch takes the offset there.
    """
    size, offset = struct.unpack("<LL", harmless[-10:-2])
    assert harmless[-22:-18] == b"PK\x05\x06"
    bad_size, bad_offset = struct.unpack("<LL", evil[-10:-2])
    count = harmless[-14:-10]
    directory = harmless[offset : offset + size]
    if bad_size > size:
        raise ValueError("the directories must be of one size")
    body = evil[: bad_offset + bad_size] + harmless[:offset] + directory
    return body + b"PK\x05\x06" + bytes(4) + count + struct.pack("<LLH", size, bad_offset, 0)


@pytest.mark.parametrize("swap", [False, True])
def test_two_central_directories(tools, mlp, marker, tmp_path, swap):
    program = tmp_path / "a.pt2"
    tools.save_program(mlp, program, torch.randn(2, 33))
    tools.rewrite(program)
    harmless = program.read_bytes()
    evil = io.BytesIO()
    torch.save(tools.Trap(marker), evil)
    tools.rewrite(program, {PICKLED["program"]: evil.getvalue()})
    pair = harmless, program.read_bytes()
    program.write_bytes(two_directories(*(pair[::-1] if swap else pair)))
    tools.refuses(program)


@pytest.mark.parametrize("kind", PICKLED)
def test_a_local_header_that_says_another_name(tools, files, kind):
    path = files[kind]
    tools.rewrite(path)
    data = path.read_bytes()
    name = PICKLED[kind].encode()
    first = data.index(name)
    path.write_bytes(data[:first] + name[:-1] + b"?" + data[first + len(name) :])
    try:
        load(path)
    except Exception:
        tools.refuses(path)


@pytest.mark.parametrize("kind", PICKLED)
def test_data_before_the_archive(tools, files, kind):
    path = files[kind]
    path.write_bytes(b"PK" + bytes(100) + path.read_bytes())
    try:
        load(path)
    except Exception:
        tools.refuses(path)


def test_an_archive_that_unpacks_to_far_too_much(tools, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(100 << 20))
    assert path.stat().st_size < 1 << 20
    assert "far more than its size" in tools.refuses(path)


@pytest.mark.parametrize("claimed", [1 << 31, (1 << 32) - 2])
def test_an_archive_that_only_claims_to(tools, files, claimed):
    """The directory says a size that no data stands for: it must not be allocated."""
    path = files["pickle"]
    tools.rewrite(path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<L", claimed)
    path.write_bytes(data)
    assert "far more than its size" in tools.refuses(path)


def test_a_zip_archive_of_something_else(tools, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("word/document.xml", b"<a/>")
    assert "not of a model" in tools.refuses(tmp_path / "a.zip")


def test_an_empty_zip_archive(tools, tmp_path):
    zipfile.ZipFile(tmp_path / "a.zip", "w").close()
    assert "not of a model" in tools.refuses(tmp_path / "a.zip")


def test_any_top_folder(tools, files):
    assert [sniff(path) for path in files.values()] == ["pickle-zip", "torchscript", "torch-export"]
