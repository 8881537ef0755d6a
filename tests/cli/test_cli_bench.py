"""``qkit bench``: a table, the same figures as JSON and in a folder, and honest exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from command import Done, qkit
from torch import nn

from qkit.report import BenchReport
from qkit.report.bench_text import grids, sentences


@pytest.fixture(scope="module")
def out(models, tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "out"


@pytest.fixture(scope="module")
def done(models, out) -> Done:
    torch.save(nn.Sequential(nn.Linear(5, 5)), models / "other-sizes.pt")
    return qkit(
        *("bench", "first=net.pt", "net.pt", "other-sizes.pt", "--calib", "x.npz"),
        *("--repeats", "5", "--starts", "1", "--batch", "1,2", "-o", out),
        cwd=models,
    )


def test_tables_and_the_folder_have_the_same_figures(done, out):
    report = BenchReport.from_json(json.loads((out / "bench.json").read_text()))
    assert [each.name for each in report.contenders] == ["first", "net.pt", "other-sizes.pt"]
    words = " ".join(done.out.split())
    for grid in grids(report):
        for row in grid.rows:
            assert all(" ".join(cell.split()) in words for cell in row)
    assert all(line in words for line in sentences(report))
    assert (report.batches, report.baseline) == ((1, 2), "first")
    assert report.command.startswith("qkit bench first=net.pt net.pt other-sizes.pt --calib x.npz")


def test_who_fails_is_told_by_the_exit_code(done):
    assert done.code == 1
    assert done.error.startswith("1 of 3 contenders failed")
    assert "other-sizes.pt failed: loading: the model fails on the inputs" in done.out
    assert "starting net.pt" in done.err


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["gone.pt"], 3, "no such file"),
        (["net.pt", "--baseline", "x"], 2, "no contender of this name"),
        (["net.pt", "--batch", "1,x"], 2, "is not like"),
        (["net.pt", "--batch", "0"], 2, "not possible: batch"),
        (["net.pt", "--input", "1x3x8x8", "--calib", "x.npz"], 2, "not both"),
        (["a=net.pt", "a=norm.pt"], 2, "two contenders of one name"),
        (["net.pt", "-o", "."], 2, "left alone"),
        ([], 2, "Missing argument"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_usage(args, code, told, models, main, monkeypatch):
    monkeypatch.chdir(models)
    done = main("bench", *args)
    assert done.code == code
    assert told in done.err
