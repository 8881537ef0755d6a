"""A streamed run that is killed goes on with ``--resume``, and gives the identical bytes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import names, python, qkit
from safetensors.torch import save_file

from qkit.errors import InputError, OutputError, UsageError
from qkit.flows import Request, stream_file
from qkit.targets.journal import JOURNAL, Journal, read_journal
from qkit.targets.staging import left_behind

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
    pytest.mark.usefixtures("same_process", "one_thread"),
]

# Kills itself once a share of the source is read; what is finished is journaled at once.
SCRIPT = """
import os, signal, sys
from qkit.flows import Request, pieces, stream, stream_file
pieces.BLOCK, stream.COMMIT_SECONDS = 1000, 0
path, out, share, workers, shards = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])

def progress(done, total, name):
    if done >= share * total:
        os.kill(os.getpid(), signal.SIGKILL)

stream_file(Request(path, "w4a16-g32", output=out), shard_bytes=int(shards),
            workers=int(workers), resume=True, progress=progress)
"""
SHARD = 9000


def state() -> dict[str, torch.Tensor]:
    tensors = {f"layers.{i}.fc.weight": torch.randn(31, 33 + i) for i in range(12)}
    tensors |= {f"layers.{i}.fc.bias": torch.randn(31) for i in range(12)}
    tensors["norm.weight"] = torch.randn(7)
    return tensors | {"long.weight": torch.randn(3, 2001), "empty": torch.empty(0, 3)}


@pytest.fixture(params=["safetensors", "pt"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors, path = state(), tmp_path / f"m.{request.param}"
    if request.param == "pt":
        tensors["tied.weight"] = tensors["layers.3.fc.weight"].detach()
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


def run(path: Path, out: Path, **options):
    given = {"shard_bytes": SHARD} | options
    return stream_file(Request(str(path), "w4a16-g32", output=str(out)), **given)


def kill(path: Path, out: Path, share: float, workers: int = 1) -> dict:
    """What the journal of the killed run holds."""
    done = python("-P", "-c", SCRIPT, *map(str, (path, out, share, workers, SHARD)))
    assert done.code == -signal.SIGKILL, done.err
    assert not out.exists()
    (folder,) = left_behind(out)
    found = read_journal(folder)
    assert found is not None
    return found[1]


def test_killed_again_and_again(
    source: Path, tmp_path: Path, bytes_of: Callable[[Path], dict[str, bytes]]
) -> None:
    rows = run(source, tmp_path / "want").layers
    out, told = tmp_path / "out", []
    first, second = kill(source, out, 0.3), kill(source, out, 0.7, workers=2)
    assert first.keys() < second.keys()
    report = run(source, out, resume=True, told=told.append)
    assert any(f"resumed: {len(second)} of" in line for line in told)
    assert bytes_of(out) == bytes_of(tmp_path / "want")
    assert report.layers == rows
    assert names(tmp_path) == sorted([source.name, "out", "want"])
    assert not (out / JOURNAL).exists()


def test_killed_when_everything_is_written(
    tmp_path: Path, bytes_of: Callable[[Path], dict[str, bytes]]
) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")
    run(path, tmp_path / "want")
    kill(path, tmp_path / "out", 1.0)
    run(path, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_another_run_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    tensors = state()
    save_file(tensors, path := tmp_path / "m.safetensors")
    out = tmp_path / "out"
    done = kill(path, out, 0.5)
    with pytest.raises(UsageError, match=r"another one.*another shard size"):
        run(path, out, shard_bytes=None, resume=True)
    with pytest.raises(UsageError, match=r"another recipe"):
        stream_file(Request(str(path), "w8a16", output=str(out)), shard_bytes=SHARD, resume=True)
    stat = path.stat()
    save_file(tensors | {"norm.weight": torch.ones(7)}, path)
    with pytest.raises(UsageError, match=r"another source"):
        run(path, out, resume=True)
    (folder,) = left_behind(out)
    found = read_journal(folder)
    assert found is not None
    assert found[1] == done
    save_file(tensors, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(path, out, resume=True)


def test_without_resume_it_starts_anew(tmp_path: Path) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")
    kill(path, tmp_path / "out", 0.5)
    told: list[str] = []
    run(path, tmp_path / "out", told=told.append)
    assert any("--resume would have gone on with it" in line for line in told)
    assert names(tmp_path) == ["m.safetensors", "out"]


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")
    done = qkit("quantize", path, "--resume", "--workers", "2", "-o", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "nothing to resume: starting from the beginning" in done.err
    again = qkit("quantize", path, "--resume", "-o", "out", cwd=tmp_path)
    assert (again.code, "the output exists" in again.error) == (2, True)


@pytest.mark.parametrize("damage", ["shard", "header", "journal"])
def test_what_was_left_is_damaged(tmp_path: Path, damage: str) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")
    kill(path, tmp_path / "out", 0.5)
    (folder,) = left_behind(tmp_path / "out")
    first = min(folder.glob("model-*.safetensors"))
    if damage == "shard":
        first.unlink()
    elif damage == "header":
        first.write_bytes(b"\0" * first.stat().st_size)
    else:
        (folder / JOURNAL).write_text("{")
        told: list[str] = []
        run(path, tmp_path / "out", resume=True, told=told.append)
        assert "nothing to resume: starting from the beginning" in told
        return
    with pytest.raises(InputError, match="damaged"):
        run(path, tmp_path / "out", resume=True)


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")

    def touch(done: int, total: int, name: str) -> None:
        os.utime(path)

    with pytest.raises(InputError, match=r"changed while it was read.*m\.safetensors"):
        run(path, tmp_path / "out", progress=touch)
    assert names(tmp_path) == ["m.safetensors"]


def test_a_job_that_fails_stops_the_others(tmp_path: Path, monkeypatch) -> None:
    save_file(state(), path := tmp_path / "m.safetensors")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        run(path, tmp_path / "out", workers=3)
    assert names(tmp_path) == ["m.safetensors"]


def test_the_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    journal = Journal(tmp_path, {"a": 1})
    journal.add("größe", {"row": None})
    assert read_journal(tmp_path) == ({"a": 1}, {})  # not before it is committed
    journal.commit()
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('["cut", {"ro')
    again = Journal(tmp_path, {"a": 1})
    assert again.done == {"größe": {"row": None}}
    again.add("x", 3)
    again.commit()
    assert read_journal(tmp_path) == ({"a": 1}, {"größe": {"row": None}, "x": 3})
    assert len(list(map(json.loads, (tmp_path / JOURNAL).read_text().splitlines()))) == 3
    again.remove()
    assert read_journal(tmp_path) is None
