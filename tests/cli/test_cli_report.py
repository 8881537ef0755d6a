"""``--report``: written beside the artifact, refused before any work."""

from __future__ import annotations

import json

import pytest
from command import names
from pages import Page, bench, markdown_tables


def test_quantize_writes_what_it_prints(models, main, tmp_path, same_process):
    out, page, text, data = (tmp_path / name for name in ("out", "r.html", "r.md", "r.json"))
    options = ["--report", page, "--report", text, "--report", data, "-o", out]
    done = main("quantize", models / "net.pt", "--scheme", "w4a16-g32", *options)
    assert done.code == 0, done.err
    shown = Page(page.read_text())
    facts = dict(zip(shown.facts[::2], shown.facts[1::2], strict=True))
    printed = " ".join(done.out.split())
    for name in (
        "scheme",
        "coverage",
        "size",
        "error",
        "latency",
        "kernels",
        "verified",
        "artifact",
    ):
        assert " ".join(facts[name].split()) in printed, name
    assert facts.items() >= dict(
        row for table in markdown_tables(text.read_text()) if table[0] == ["", ""]
        for row in table[1:] if row[0] in ("cpu", "size", "error")
    ).items()  # fmt: skip
    command = json.loads(data.read_text())["sections"][-2]["blocks"][0]["text"]
    assert command.startswith(f"qkit quantize {models / 'net.pt'} --scheme w4a16-g32 --report ")
    assert command.endswith(f"-o {out}")
    # What was measured for it is in the artifact's report too.
    assert json.loads((out / "report.json").read_text())["details"]["histograms"]


def test_compress_writes_its_ledger(models, main, tmp_path, same_process):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"steps": ["quantize"], "input": "4x3x8x8"}))
    page = tmp_path / "ledger.html"
    done = main("compress", recipe, models / "net.pt", "-o", tmp_path / "out", "--report", page)
    assert done.code == 0, done.err
    table = Page(page.read_text()).tables[0]
    assert [row[0] for row in table] == ["after", "float", "1 quantize"]
    for size in (row[3] for row in table[1:]):
        assert size in done.out


@pytest.mark.parametrize("command", ["quantize", "compress"])
def test_refused_before_any_work(command, models, main, tmp_path):
    first = ["recipe.json"] if command == "compress" else []
    done = main(command, *first, models / "none.pt", "--report", tmp_path / "out.pdf")
    assert (done.code, names(tmp_path)) == (2, [])
    assert "wanted: a name that ends in .html, .md, .json" in done.error
    (tmp_path / "r.md").write_text("# mine\n")
    done = main(command, *first, models / "none.pt", "--report", tmp_path / "r.md")
    assert done.code == 2
    assert "the output exists" in done.error


def test_bench_writes_what_it_prints(models, main, tmp_path, monkeypatch):
    asked = {}

    def measured(contenders, inputs, **options):
        asked.update(options)
        return bench()

    monkeypatch.setattr("qkit.flows.bench.bench", measured)
    page = tmp_path / "bench.html"
    done = main("bench", models / "net.pt", "--report", page)
    assert done.code == 1  # one of its contenders failed
    assert asked["command"] == f"qkit bench {models / 'net.pt'} --report {page}"
    medians = [row[1] for row in Page(page.read_text()).tables[1][1:]]
    assert medians == ["2 ms", "1 ms", "1.96 ms"]
    assert all(median in done.out for median in medians)
    assert main("bench", models / "net.pt", "--report", page).code == 2


def test_a_dry_run_writes_the_report_that_was_asked_for(models, main, tmp_path):
    path = tmp_path / "r.json"
    done = main("quantize", models / "net.pt", "--dry-run", "--report", path)
    assert done.code == 0, done.err
    assert names(tmp_path) == ["r.json"]
    said = json.loads(path.read_text())["verdict"]
    assert said[1] == "Speed was not measured."
    assert said[3].startswith("Not verified (not run)")
