"""Whether a run streams when it is not told: by what the file holds, its size, and the request."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import qkit
from safetensors.torch import save_file
from torch import nn

from qkit.errors import InputError, UnsafePickleError, UsageError
from qkit.flows import Request, choose
from qkit.report import free_memory_bytes, machine

# The names that the packages give to functions are those of their modules.
CHOOSE, MACHINE = (sys.modules[f"qkit.{name}"] for name in ("flows.choose", "report.machine"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = nn.Linear(33, 31)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(net, tmp_path / "module.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is
        torch.jit.script(net).save(str(tmp_path / "script.pt"))
    for name, config in (("bare", None), ("hf", {"architectures": ["BertModel"]})):
        (tmp_path / name).mkdir()
        save_file(net.state_dict(), tmp_path / name / "model.safetensors")
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "streamed", "reason"),
    [
        ("m.safetensors", {}, True, "only tensors"),
        ("state.pt", {"scheme": "w4a16-g128"}, True, "only tensors"),
        ("bare", {}, True, "only tensors"),
        ("hf", {}, False, r"the model fits \(.* of weights, .* GB of free memory\)"),
        ("module.pt", {}, False, "a pickled module is loaded whole"),
        ("old.pt", {}, False, "a pickle-legacy file is loaded whole"),
        ("script.pt", {}, False, "a torchscript file is loaded whole"),
        ("state.pt", {"model": "net:Net"}, False, "--model: a checkpoint that is streamed"),
        ("state.pt", {"dry_run": True}, False, "--dry-run"),
        ("state.pt", {"format": "gguf", "scheme": "w8a16-g32"}, False, "--format qkit is what"),
        ("state.pt", {"trust_pickle": True}, False, "--trust-pickle"),
        ("state.pt", {"scheme": "w8a8-static"}, False, "learnt from data"),
        ("hf", {"scheme": "w4a16-g32", "calib": "x.npz"}, False, "gptq learns from the inputs"),
    ],
)
def test_the_choice_and_its_reason(
    folder: Path, name: str, options: dict, streamed: bool, reason: str
) -> None:
    pytest.importorskip("transformers")
    choice = choose(Request(str(folder / name), **options))
    assert choice.streamed is streamed
    assert re.search(reason, choice.reason), choice.reason
    for asked in (True, False):
        assert choose(Request(str(folder / name), **options), streamed=asked).streamed is asked


def test_what_is_large_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / "hf" / "model.safetensors").stat().st_size
    monkeypatch.setattr(CHOOSE, "free_memory_bytes", lambda: 3 * size - 1)
    choice = choose(Request(str(folder / "hf")))
    assert choice.streamed
    assert "more than a third of the free memory" in choice.reason
    choice = choose(Request(str(folder / "hf"), dry_run=True))
    assert not choice.streamed
    assert "expect it to run short" in choice.reason
    monkeypatch.setattr(CHOOSE, "free_memory_bytes", lambda: 3 * size)
    assert not choose(Request(str(folder / "hf"))).streamed


def test_refusals_are_those_of_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown scheme"):
        choose(Request(str(folder / "nowhere"), "w99"))
    with pytest.raises(InputError, match="no such file"):
        choose(Request(str(folder / "nowhere")))
    torch.save({"a": torch.ones(3), "path": Path("x")}, tmp_path / "unsafe.pt")
    with pytest.raises(UnsafePickleError):
        choose(Request(str(tmp_path / "unsafe.pt")))


def test_free_memory_is_part_of_the_memory() -> None:
    assert 0 < free_memory_bytes() <= machine()["memory_bytes"]


def test_a_container_has_the_memory_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    names = ("memory.max", "memory.current")
    monkeypatch.setattr(MACHINE, "_CONTAINERS", [(str(tmp_path), *names)])
    assert free_memory_bytes() == 700000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_memory_bytes() == 900000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes() > 900000


def test_the_command_says_what_it_chose(folder: Path) -> None:
    done = qkit("quantize", "state.pt", "-o", "a", cwd=folder)
    assert done.code == 0, done.err
    assert "streaming: the file holds only tensors" in done.err
    assert "of a sample" not in done.out  # so small a file is measured whole
    done = qkit("quantize", "state.pt", "-o", "b", "--no-stream", cwd=folder)
    assert done.code == 0, done.err
    assert "in memory: as asked" in done.err
    assert (folder / "a/model.safetensors").read_bytes() == (
        folder / "b/model.safetensors"
    ).read_bytes()
    done = qkit("quantize", "state.pt", "--no-stream", "--shard-size", "1MB", cwd=folder)
    assert (done.code, "are for a run that streams" in done.error) == (2, True)
    done = qkit("quantize", "module.pt", "--shard-size", "1MB", cwd=folder)
    assert (done.code, "only files of plain tensors" in done.error) == (7, True)
