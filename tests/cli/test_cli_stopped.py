"""A run that is stopped leaves nothing; one that is killed leaves nothing visible."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ENVIRONMENT, files, names

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def started(models: Path, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A run that has written its files and is verifying them, in its own process group."""
    (tmp_path / "tmp").mkdir()
    flags = ["-P"] if sys.version_info >= (3, 11) else []
    process = subprocess.Popen(
        [sys.executable, *flags, "-m", "qkit", "quantize", models / "net.pt", "--overwrite", "-q",
         "-o", tmp_path / "out" / "net"],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list((tmp_path / "out").glob(".net.partial-*/qkit.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)  # so that the fresh process runs
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def left(folder: Path) -> list[str]:
    """Processes that still work for a run whose temporary files are in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if os.fsencode(folder) in path.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("number", "everyone", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 143),
    ],
    ids=["ctrl-c", "terminate"],
)
def test_a_stopped_run_leaves_nothing(number, everyone, code, started, tmp_path):
    (os.killpg if everyone else os.kill)(started.pid, number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == code
    assert (out, err) == ("", "qkit: interrupted; nothing partial was left behind\n")
    assert names(tmp_path) == ["tmp"]  # the parent folder too was made by the run
    assert not list((tmp_path / "tmp").glob("qkit-*"))
    assert left(tmp_path) == []


def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(
    started, models, main, tmp_path, same_process
):
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode == -signal.SIGKILL
    (stale,) = names(tmp_path / "out")
    assert re.fullmatch(rf"\.net\.partial-{started.pid}", stale)
    done = main("quantize", models / "state.pt", "-q", "-o", tmp_path / "out" / "net")
    assert (done.code, done.err) == (0, "")
    assert names(tmp_path / "out") == ["net"]


OVERWRITING = """
import os, signal, sys, time
from pathlib import Path
rename = Path.rename
def slow(self, target):
    if self.name.startswith(".net.partial-"):
        # The old artifact has been moved away, the new one is not there yet.
        os.kill(os.getpid(), int(sys.argv[1]))
    return rename(self, target)
Path.rename = slow
from qkit.cli import main
sys.exit(main(sys.argv[2:]))
"""


def overwriting(number: int, models: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", OVERWRITING, str(int(number)), "quantize", str(models / "state.pt"),
         "-q", "--overwrite", "-o", str(out), "--scheme", "w4a16"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def old(artifact: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(artifact, tmp_path / "net"))


def test_killed_in_the_middle_of_replacing_the_next_run_brings_the_old_one_back(
    old, models, main, tmp_path, same_process
):
    before = files(old)
    assert overwriting(signal.SIGKILL, models, old).returncode == -signal.SIGKILL
    assert not old.exists()
    assert len(names(tmp_path)) == 2  # both versions, under hidden names
    done = main("quantize", models / "state.pt", "-q", "-o", old)
    assert done.code == 2
    assert "the output exists" in done.error
    assert files(old) == before
    assert main("quantize", models / "state.pt", "-q", "-o", old, "--overwrite").code == 0
    assert files(old) != before
    assert names(tmp_path) == ["net"]


def test_ctrl_c_in_the_middle_of_replacing_waits_until_it_is_done(
    old, models, main, tmp_path, same_process
):
    before = files(old)
    done = overwriting(signal.SIGINT, models, old)
    assert done.returncode == 130
    assert names(tmp_path) == ["net"]
    after = files(old)
    assert after["qkit.json"] != before["qkit.json"]
    assert main("verify", old).code == 0


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, main):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    main("schemes")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert callable(signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_each_signal_has_its_own_code(number, code, main, monkeypatch):
    import qkit.flows

    monkeypatch.setattr(qkit.flows, "inspect", lambda *a, **k: signal.raise_signal(number))
    done = main("inspect", "x")
    assert done.code == code
    assert done.err == "qkit: interrupted; nothing partial was left behind\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_until_torch_is_imported(number, code, main, monkeypatch):
    """Torch's start in C swallows an exception, and goes on without numpy, or aborts."""
    import torch

    import qkit.flows

    reached = []

    def inspect(*args, **options):
        monkeypatch.setattr(torch.__spec__, "_initializing", True)
        signal.raise_signal(number)
        time.sleep(0.2)  # it is tried again meanwhile
        reached.append("imported")
        monkeypatch.setattr(torch.__spec__, "_initializing", False)
        time.sleep(60)
        reached.append("swallowed")

    monkeypatch.setattr(qkit.flows, "inspect", inspect)
    done = main("inspect", "x")
    assert (done.code, reached) == (code, ["imported"])
