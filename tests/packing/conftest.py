"""Both ways to run the entropy coders: numpy, and the kernels compiled here from their source."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkit.packing.entropy import compiled

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
WAYS = ["numpy", "native"]
Use = Callable[[str], None]


@pytest.fixture(scope="session")
def entropy_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL | None:
    """``kernels/entropy.cpp`` on its own; None without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    path = tmp_path_factory.mktemp("kernels") / "entropy.so"
    flags = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, KERNELS / "entropy.cpp", "-o", path], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def use(entropy_kernels: ctypes.CDLL | None) -> Iterator[Use]:
    """A function that chooses the way."""
    with pytest.MonkeyPatch.context() as patch:

        def choose(way: str) -> None:
            if way == "native" and entropy_kernels is None:
                pytest.skip("no C++ compiler")
            kernels = entropy_kernels if way == "native" else None
            patch.setattr(compiled, "library", lambda: kernels)

        yield choose


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, use: Use) -> str:
    """Each way in turn."""
    use(request.param)
    return request.param
