"""The document of a bench: its figures are those of the terminal, and no tie is called a win."""

from __future__ import annotations

from dataclasses import replace

from pages import HOSTILE, Page, bench

from qkit.report.bench_document import bench_document
from qkit.report.bench_text import grids
from qkit.report.document import Table
from qkit.report.html import to_html
from qkit.report.noise import Noise
from qkit.report.words import show


def shown(name: str, report=None) -> list[list[str]]:
    """The tables of a section, as they are read."""
    part = next(p for p in bench_document(report or bench()).sections if p.name == name)
    tables = [block for block in part.blocks if isinstance(block, Table)]
    return [
        [show(v, c.kind) for v, c in zip(row, table.columns, strict=True)]
        for table in tables
        for row in table.rows
    ]


def test_the_figures_are_those_of_the_terminal():
    costs, outputs, times, _ = grids(bench())
    names = ("SQNR", "cosine", "max error", "top-1", "KL", "mine:accuracy")
    for row, errors, other in zip(costs.rows, outputs.rows, shown("costs"), strict=True):
        printed = dict(zip(costs.head, row, strict=True))
        known = ("load", "first call", "peak memory", "before loading")
        assert other[3:7] == [printed[name] for name in known]
        printed = dict(zip(outputs.head, errors, strict=True))
        assert other[7:] == [printed[name] for name in names]
    for row, other in zip(times.rows, shown("latency"), strict=True):
        printed = dict(zip(times.head, row, strict=True))
        assert other[0] == printed["contender"]
        assert other[1] == printed["median"]
        assert f"{other[2]} to {other[3]}" == printed["interval"]
        assert other[4:6] == [printed["p90"], printed["samples/s"]]
        assert printed["speed beside net.pt"].endswith(other[9])
        if other[6]:
            assert printed["speed beside net.pt"].startswith(other[6])
    sizes = [row[1] for row in shown("tradeoff")]
    assert sizes == [row[costs.head.index("size")] for row in costs.rows]


def test_the_frontier():
    found = {row[0]: row[4] for row in shown("tradeoff")}
    assert found == {"net.pt": "yes", HOSTILE: "yes", "beaten": "no", "broken.onnx": "n/a"}
    same = replace(bench(), contenders=(*bench().contenders[:1], bench().contenders[1],
                                        replace(bench().contenders[1], name="twin")))  # fmt: skip
    assert [row[4] for row in shown("tradeoff", same)] == ["yes", "yes", "yes"]


def test_the_verdict():
    said = bench_document(bench()).verdict
    assert said == (
        f"{HOSTILE}: 4.00 times smaller (1 MB), faster at batch 1, 2 threads (2.00x, 1.80 to 2.20; "
        "1 ms), SQNR 31.2 dB.",
        "beaten: 2.00 times smaller (2 MB), not distinguishable at batch 1, 2 threads (1.02x, 0.92 "
        "to 1.12; 1.96 ms), SQNR 20.5 dB.",
        "broken.onnx failed: no graph.",
        "The machine was quiet.",
    )
    loud = replace(bench(), noise=Noise(False, ("the clock fell",)))
    assert "measure again" in bench_document(loud).verdict[-1]
    facts = [row for row in Page(to_html(bench_document(loud))).facts if row == "a processor"]
    assert facts == ["a processor"]
