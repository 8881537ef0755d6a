"""The ways to run the entropy coders: numpy, the kernels' scalar code, and their best code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from qkit import native
from qkit.packing.entropy import compiled

WAYS = ["numpy", "scalar", "native"]
Use = Callable[[str], None]


@pytest.fixture(scope="module")
def use() -> Iterator[Use]:
    """A function that chooses the way."""
    kernels = native.library()

    def choose(way: str) -> None:
        if way != "numpy" and kernels is None:
            pytest.skip(f"no kernels: {native.status()}")
        patch.setattr(compiled, "library", lambda: None if way == "numpy" else kernels)
        if kernels is not None:
            kernels.qkit_use(b"scalar" if way == "scalar" else usual)

    usual = os.environ.get("QKIT_ISA", "").encode() or None
    with pytest.MonkeyPatch.context() as patch:
        yield choose
        choose("native" if kernels is not None else "numpy")


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, use: Use) -> str:
    """Each way in turn."""
    use(request.param)
    return request.param
