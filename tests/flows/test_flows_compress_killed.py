"""``qkit compress`` is killed at random moments, and goes on to the same figures and bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import ENVIRONMENT
from torch import nn

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# The command, which verifies without processes of its own: their start would be most of the time.
COMMAND = """
import sys
import pytest
from command import verify_in_this_process
from qkit.flows.compress import CompressRequest, compress_file
patch = pytest.MonkeyPatch()
verify_in_this_process(patch)
ask = CompressRequest("recipe.json", "net.pt", sys.argv[1], sys.argv[2])
compress_file(ask, told=lambda text: print(text, file=sys.stderr, flush=True))
"""
RECIPE = {
    "steps": [
        {"prune": {"amount": 0.3, "steps": 2, "train": {"epochs": 3}}},
        {"train": {"epochs": 20, "lr": 0.01}},
        {"distill": {"epochs": 10}},
        {"cluster": {"entries": 8, "train": {"epochs": 3}}},
    ],
    "data": "train.npz",
    "val": "train.npz",
    "input": "8x20",
    "format": "coded",
}


def started(folder: Path, output: str, work: str) -> subprocess.Popen[str]:
    """A run whose model is loaded."""
    tests = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, output, work],
        cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": tests}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("loaded"), process.communicate()
    return process


def forget(folder: Path) -> None:
    """Take away what a run has written, but for its work."""
    for name in ("parts.qkit", "parts.ledger.json"):
        (folder / name).unlink(missing_ok=True)


def figures(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger without what depends on the time."""
    rows = json.loads(path.read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("latency_ms", "seconds")} for row in rows]


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    hidden = [nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()]
    torch.save(nn.Sequential(*hidden, nn.Linear(48, 4)), tmp_path / "net.pt")
    x = np.random.default_rng(0).normal(size=(320, 20)).astype("f4")
    np.savez(tmp_path / "train.npz", input=x, labels=x[:, :4].argmax(1))
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    whole = started(tmp_path, "whole.qkit", "w1")
    start = time.monotonic()
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    takes, moments, kills, went_on = time.monotonic() - start, random.Random(), 0, ""
    for _ in range(4):
        # Killed behind its last step, which a busy machine may bring forward: the step once more.
        forget(tmp_path)
        process = started(tmp_path, "parts.qkit", "w2")
        try:
            _, err = process.communicate(timeout=moments.uniform(0.2, 0.7) * takes)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, err
        went_on = err
        break
    if not went_on:
        forget(tmp_path)
        process = started(tmp_path, "parts.qkit", "w2")
        _, went_on = process.communicate()
        assert process.returncode == 0, went_on
    assert kills >= 1
    assert went_on
    assert (tmp_path / "parts.qkit").read_bytes() == (tmp_path / "whole.qkit").read_bytes()
    assert figures(tmp_path / "parts.ledger.json") == figures(tmp_path / "whole.ledger.json")
