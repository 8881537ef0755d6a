"""What ``pytest benchmarks/suite.py`` needs: the scripts beside it, and who and where it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers warn; that is not what is looked at here."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What ``qkit bench compare`` tells machines apart by, and the versions."""
    import torch  # noqa: F401  its threads are a fact

    from qkit.report import machine, versions

    machine_info["qkit"] = {"machine": machine(), "versions": versions()}
