"""The page in a real browser: drawn, without a request, readable in every light and width."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import opened, whole
from pages import HOSTILE, bench, report

from qkit.report.bench_document import bench_document
from qkit.report.html import to_html
from qkit.report.quantization import quantization_document


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"files": {"model.safetensors": 1024, "qkit.json": 512}, "layers": {HOSTILE: 900}}
    shown = {
        "quantize": quantization_document(report(), "qkit quantize net.pt", **sizes),
        "bench": bench_document(bench()),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, each in shown.items():
        (folder / f"{name}.html").write_text(to_html(each))
    return {name: folder / f"{name}.html" for name in shown}


@pytest.fixture(scope="module")
def file(files: dict[str, Path]) -> Path:
    return files["quantize"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["quantize", "bench"])
def test_the_page_is_whole(browser, files, kind, width, scheme):
    whole(browser, files[kind], width, scheme)


def test_hovering_and_the_keyboard(browser, file):
    seen = opened(browser, file)
    seen.tab.locator("#layers ~ .charts .mark-rect path").nth(1).hover()
    tip = seen.tab.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    text = tip.inner_text()
    assert HOSTILE.split("&")[0] in text
    assert "21.5 dB" in text
    seen.tab.keyboard.press("Tab")
    assert seen.tab.evaluate("document.activeElement.className") == "skip"
    seen.tab.keyboard.press("Enter")
    assert seen.tab.evaluate("location.hash") == "#main"
    assert seen.problems == []
    seen.tab.context.close()


def test_on_paper(browser, file):
    seen = opened(browser, file, scheme="dark")
    assert len(seen.tab.pdf()) > 10_000
    seen.tab.emulate_media(media="print")
    paper = seen.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    seen.tab.set_viewport_size({"width": 700, "height": 990})  # A4 with its margins
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= 700
    assert seen.tab.locator("table:visible").count() > 5
    assert seen.tab.locator("details:visible").count() == 0
    assert seen.tab.locator("nav:visible").count() == 0
    seen.tab.context.close()
