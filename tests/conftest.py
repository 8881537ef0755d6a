"""Settings shared by all tests: reproducible property tests, quiet libraries, small models."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

# One of several processes that share the tests (``-n``) leaves the other processors to the others.
# The tests of threads ask for theirs; the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach for a network; said before any library looks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# MKL (torch's float products and attention) gives the same bits in every process only when asked,
# before it is loaded; the processes that tests start inherit it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

settings.register_profile(
    "qkit",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("qkit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n``: the tests of a file share what its fixtures made, and those of families a page.

    Taken by ``--dist loadgroup``.
    """
    for item in items:
        folder = item.path.parent
        group = folder if folder.name == "families" else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))


# The command, called in this process, takes these; tests that follow it find them as they were.
SIGNALS = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Every test ends with the handlers of the process that runs the tests."""
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What a test compiled does not count for the next one: torch refuses the ninth version of the
    same ``forward``, as that of ``nn.Sequential`` is, with ``fullgraph``."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Sequential:
    """Odd sizes on purpose."""
    return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7)).eval()


@pytest.fixture
def cnn() -> nn.Sequential:
    """A small network with both quantized kinds, a normalisation and odd channel counts."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 5, 3, stride=2, padding="valid"),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(45, 10),
    ).eval()
