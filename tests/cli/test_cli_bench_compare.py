"""``qkit bench compare``: the table, and the exit codes that a pipeline looks at."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from qkit.cli import main
from qkit.cli.bench_compare import command

from qkit.report.regression import NOISE, compare_runs


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    """Files of pytest-benchmark: ``same`` has the times of ``before``, ``slow`` twice as much."""
    random = np.random.default_rng(0)
    seconds = 1e-3 * (1 + random.exponential(0.05, 50))
    about = {"machine": "x86_64", "cpu": {"brand_raw": "a processor"}}

    def file(name: str, seconds: np.ndarray, benchmark: str = "linear") -> str:
        path = tmp_path / f"{name}.json"
        each = {"fullname": benchmark, "stats": {"data": list(seconds)}}
        path.write_text(json.dumps({"benchmarks": [each], "machine_info": about}))
        return str(path)

    return {
        "before": file("before", seconds),
        "same": file("same", seconds[::-1]),
        "slow": file("slow", 2 * seconds),
        "other": file("other", seconds, "convolution"),
    }


def test_what_is_the_same_passes(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", runs["before"], runs["same"]]) == 0
    out = capsys.readouterr().out
    assert "1.000" in out
    assert "not distinguishable" in out
    assert "0 of 1 slower by more than 5%" in out


def test_what_is_slower_is_exit_6(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", runs["before"], runs["slow"]]) == 6
    told = capsys.readouterr()
    assert "1 of 1 slower by more than 5%" in told.out
    assert "linear: 0.50 times as fast as before" in told.err
    assert main(["bench", "compare", runs["slow"], runs["before"]]) == 0
    assert main(["bench", "compare", runs["before"], runs["slow"], "--noise", "1.5"]) == 0


def test_a_folder_is_that_of_qkit_bench(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    assert main(["bench", "compare", str(tmp_path / "run"), runs["same"]]) == 3
    assert "bench.json" in capsys.readouterr().err
    Path(runs["before"]).rename(tmp_path / "run" / "bench.json")
    assert main(["bench", "compare", str(tmp_path / "run"), runs["same"]]) == 0


def test_json(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", runs["before"], runs["slow"], "--json"]) == 6
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["verdict"], row["ratio"]) == ("slower", 0.5)


def test_nothing_to_compare_is_exit_3(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare", runs["before"], runs["other"]]) == 3
    assert "no benchmark is in both runs" in capsys.readouterr().err
    assert main(["bench", "compare", runs["before"], str(tmp_path / "none.json")]) == 3
    assert main(["bench", "compare", runs["before"], runs["same"], "--control", "x*"]) == 2
    assert main(["bench", "compare", runs["before"]]) == 2


def test_the_option_has_the_default_of_the_library() -> None:
    (option,) = [each for each in command.params if each.name == "noise"]
    assert option.default == NOISE == inspect.signature(compare_runs).parameters["noise"].default
