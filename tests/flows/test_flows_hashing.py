"""Hashing beside the work: the right hashes, never far ahead, and no thread that stays."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from pathlib import Path

import pytest

from qkit.flows import hashing as module
from qkit.flows.hashing import hashing


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (3 << 20, 0, (1 << 20) + 33), strict=True):
        path.write_bytes(bytes(i % 251 for i in range(256)) * (size // 256) + b"x" * (size % 256))
    return paths


@pytest.mark.parametrize("workers", [1, 3])
def test_the_facts(files: list[Path], workers: int) -> None:
    with hashing(files, workers, lambda: math.inf) as facts:
        found = facts()
    assert found == {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def test_it_waits_for_the_work(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", 1 << 20)
    asked: list[float] = []
    reached = [0.0]

    def work() -> float:
        asked.append(reached[0])
        return reached[0]

    before = threading.active_count()
    with hashing(files, 1, work) as facts:
        end = time.monotonic() + 10
        while len(asked) < 20 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(asked) >= 20  # it asks again and again, instead of reading on
        reached[0] = math.inf
        assert facts()["c"]["bytes"] == (1 << 20) + 33
    assert threading.active_count() == before


def test_it_ends_with_the_block(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", -1)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), hashing(files, 2, lambda: 0):
        raise KeyboardInterrupt
    assert threading.active_count() == before
