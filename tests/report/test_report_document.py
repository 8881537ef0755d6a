"""Documents: the three formats have the same numbers, and nothing out of a model becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from pages import HOSTILE, Page, markdown_tables, report

from qkit.report import Document
from qkit.report.charts import vega_lite
from qkit.report.document import (
    MAX_ROWS,
    Chart,
    Code,
    Column,
    Facts,
    Notes,
    Table,
    document,
    section,
)
from qkit.report.html import to_html
from qkit.report.markdown import to_markdown
from qkit.report.quantization import quantization_document
from qkit.report.sentences import verdict
from qkit.report.words import show

COMMAND = "qkit quantize net.pt --report out.html"


@pytest.fixture(scope="module")
def shown() -> Document:
    sizes = {"files": {"model.safetensors": 1024, "qkit.json": 512}, "layers": {HOSTILE: 900}}
    return quantization_document(report(), COMMAND, **sizes)


@pytest.fixture(scope="module")
def page(shown: Document) -> str:
    return to_html(shown)


def of_type(data: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [b for part in data["sections"] for b in part["blocks"] if b["type"] == kind]


def cells(table: dict[str, Any]) -> list[list[str]]:
    """What a person should see of a table of the JSON."""
    kinds = [column["kind"] for column in table["columns"]]
    head = [column["name"] for column in table["columns"]]
    return [head, *([show(v, k) for v, k in zip(r, kinds, strict=True)] for r in table["rows"])]


def one_line(tables: list[list[list[str]]]) -> list[list[list[str]]]:
    return [[[" ".join(cell.split()) for cell in row] for row in table] for table in tables]


def test_every_section_is_there(shown):
    names = [part.name for part in shown.sections]
    assert names == [
        "remarks", "summary", "tradeoff", "layers", "time", "weights", "activations", "bytes",
        "kernels", "training", "recipe", "machine", "reproduce", "source",
    ]  # fmt: skip
    empty = quantization_document(
        report(kernels={}, details={}, calibration={}, training={}, remarks=[], source={}),
        None, files={}, layers={},
    )  # fmt: skip
    assert [part.name for part in empty.sections] == [
        "summary", "tradeoff", "layers", "time", "weights", "recipe", "machine",
    ]  # fmt: skip
    assert to_markdown(empty).count("- n/a: ") == 2


def test_the_three_formats_have_the_same_numbers(shown, page):
    data = json.loads(shown.dumps(), parse_constant=pytest.fail)
    tables = [cells(table) for table in of_type(data, "table")]
    assert len(tables) >= 10
    assert one_line(Page(page).tables) == one_line(tables)
    in_markdown = [t for t in markdown_tables(to_markdown(shown)) if t[0] != ["", ""]]
    assert in_markdown == one_line(tables)
    facts = [
        (name, show(value, kind)) for block in of_type(data, "facts")
        for name, value, kind in block["rows"]
    ]  # fmt: skip
    assert Page(page).facts == [text for pair in facts for text in pair]
    markdown = [t[1:] for t in markdown_tables(to_markdown(shown)) if t[0] == ["", ""]]
    assert [tuple(row) for table in markdown for row in table] == [
        (name, " ".join(text.split())) for name, text in facts
    ]
    # The JSON has the numbers themselves, not what is left of them in words.
    layers = next(t for t in of_type(data, "table") if t["title"].startswith("All layers"))
    assert layers["rows"][0][5:7] == [5.0, 18.25]
    assert [row[6] for row in layers["rows"]] == [18.25, 21.5, "exact", ""]


def test_charts_draw_the_numbers_of_their_tables(shown):
    count = 0
    for table in (b for part in shown.sections for b in part.blocks if isinstance(b, Table)):
        for chart in table.charts:
            rows = vega_lite(table, chart)["data"]["values"]
            x = table.index(chart.x)
            wanted = [
                row[x] for row in table.rows[: chart.first] if isinstance(row[x], int | float)
            ]
            assert [row[f"v{x}"] for row in rows] == wanted
            assert rows, chart
            for row in rows:
                place = table.index(chart.y)
                assert row[f"t{place}"] in [
                    show(each[place], table.columns[place].kind) for each in table.rows
                ]
            count += 1
    assert count >= 8


def test_a_group_has_one_colour_in_all_charts():
    table = Table(
        "t",
        (Column("name"), Column("a", "number"), Column("b", "number")),
        (("x", 1, "exact"), ("y", 2, 3), ("z", "", "")),
        charts=(Chart("points", "c", "a", "a", "name"), Chart("points", "c", "a", "b", "name")),
    )
    drawn = [vega_lite(table, chart) for chart in table.charts]
    assert [len(spec["data"]["values"]) for spec in drawn] == [2, 1]
    for channel in ("color", "shape"):
        assert [s["encoding"][channel]["scale"]["domain"] for s in drawn] == [["x", "y"]] * 2


def test_a_name_is_never_markup(shown, page):
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert "img" not in tags
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    assert sum(attrs.get("type") is None for attrs in scripts) == 2  # the page's own
    assert any(HOSTILE in row for table in parsed.tables for row in table)
    for _, attrs in parsed.tags:
        assert not [name for name in attrs if name.startswith("on")]
    # In Markdown as well: without backslashes there is no tag and no link left.
    markdown = to_markdown(shown)
    assert "<script" not in re.sub(r"\\<", "", markdown)
    assert "[c](d)" not in re.sub(r"\\\[", "", markdown)


def test_the_page_needs_nothing_else(page):
    assert len(page.encode()) < 2e6
    for tag, attrs in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert attrs.get("src") is None
        assert (attrs.get("href") or "#").startswith("#")
    policy = dict(next(a for _, a in Page(page).tags if "http-equiv" in a))["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "Redistribution and use" in page  # the licence of what it carries


def test_a_page_without_charts_carries_no_scripts():
    page = to_html(document("x", ["y"], section("a", "A", Notes(("said",)))))
    assert len(page) < 20_000
    assert [tag for tag, _ in Page(page).tags].count("script") == 0


def test_long_tables_are_cut_and_say_so():
    table = Table("many", (Column("n", "count"),), tuple((n,) for n in range(MAX_ROWS + 234)))
    long = document("x", [], section("a", "A", table))
    assert len(Page(to_html(long)).tables[0]) == MAX_ROWS + 1
    assert len(markdown_tables(to_markdown(long))[0]) == MAX_ROWS + 1
    for text in (to_html(long), to_markdown(long)):
        assert "234 more rows are in the JSON." in text
    assert len(of_type(long.to_json(), "table")[0]["rows"]) == MAX_ROWS + 234


def test_a_fence_is_longer_than_what_it_holds():
    lines = to_markdown(document("x", [], section("a", "A", Code("c", "one\n````\ntwo")))).split(
        "\n"
    )
    fences = [line for line in lines if line.startswith("`````")]
    assert len(fences) == 2
    assert lines[lines.index("one") + 1 : lines.index("two")] == ["````"]


def test_what_makes_no_document_is_refused():
    with pytest.raises(ValueError, match="no kind"):
        Column("x", "miles")
    with pytest.raises(ValueError, match="not as long"):
        Table("t", (Column("a"),), (("x", "y"),))
    with pytest.raises(ValueError, match="not in list"):
        Table("t", (Column("a"),), (), charts=(Chart("bars", "c", "a", "b"),))
    assert section("a", "A", None, Facts(()), Notes(()), Code("c", "")) is None


def test_the_verdict_in_words():
    said = verdict(report())
    assert said[0] == "5.97 times smaller: 6.11 kB -> 1.02 kB."
    assert said[1] == (
        "2.00 times as fast in torch eager on a processor with 2 threads: 2 ms -> 1 ms."
    )
    assert "0.01 of the power" in said[2]
    assert "20.0 dB" in said[2]
    assert said[3].startswith("Verified in a fresh process (qkit; architecture): bit-identical")


def test_the_verdict_does_not_boast():
    side = {"median": 2.0, "p10": 1.5, "p90": 2.6, "repeats": 9}
    near = report().latency_ms | {"float": side, "quantized": side | {"median": 1.9},
                                  "speedup": 1.05}  # fmt: skip
    said = verdict(report(latency_ms=near))[1]
    assert said.startswith("Neither clearly faster nor slower (1.05x, within the spread")
    assert "The machine was noisy: calls spread by 58% of the median." in said
    slow = report().latency_ms | {"speedup": 0.5}
    slow |= {"quantized": {"median": 4.0, "p10": 3.9, "p90": 4.1, "repeats": 9}}
    assert verdict(report(latency_ms=slow))[1].startswith("Slower, at 0.50x the speed, in torch")
    assert verdict(report(latency_ms={}))[1] == "Speed was not measured."
    grown = report().size_bytes | {"artifact": 9000}
    assert verdict(report(size_bytes=grown))[0] == "Not smaller: 6.11 kB -> 9 kB."
    assert verdict(report(verification={"status": "not run"}))[3].startswith("Not verified")
    weights = {
        "sqnr_db": 18.25,
        "cosine": None,
        "max_abs": None,
        "level": "weights",
        "inputs": None,
    }
    assert "Outputs were not compared" in verdict(report(error=weights))[2]
    exact = report().error | {"sqnr_db": None}
    assert "exactly the float model's" in verdict(report(error=exact))[2]


def test_of_many_layers_a_chart_shows_some_and_says_so():
    row = report().layers[0]
    many = report(layers=[replace(row, name=f"l{i}", sqnr_db=float(i)) for i in range(100)])
    shown = quantization_document(many, None, files={}, layers={})
    table = next(p for p in shown.sections if p.name == "layers").blocks[0]
    assert isinstance(table, Table)
    assert "40 of 100 layers" in table.charts[0].title
    assert len(vega_lite(table, table.charts[0])["data"]["values"]) == 40
