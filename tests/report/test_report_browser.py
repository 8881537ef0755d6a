"""The page in a real browser: drawn, without a request, readable in every light and width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from pages import HOSTILE, bench, report
from playwright.sync_api import Browser, Page, sync_playwright

from qkit.report.bench_document import bench_document
from qkit.report.html import to_html
from qkit.report.quantization import quantization_document

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "() => document.querySelectorAll('.chart:not(.drawn)').length === 0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        # Its sandbox does not run as root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


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


@dataclass
class Seen:
    """A page that was opened, and what it did besides showing itself."""

    tab: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def opened(browser: Browser, file: Path, *, width: int = 1400, scheme: str = "light") -> Seen:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=False
    )
    seen = Seen(context.new_page())
    bad = ("error", "warning")
    seen.tab.on("console", lambda m: m.type in bad and seen.problems.append(m.text))
    seen.tab.on("pageerror", lambda error: seen.problems.append(str(error)))
    seen.tab.on("dialog", lambda dialog: (seen.problems.append(dialog.message), dialog.dismiss()))
    seen.tab.on("request", lambda request: seen.requests.append(request.url))
    seen.tab.goto(file.as_uri())
    seen.tab.wait_for_function(DRAWN, timeout=20_000)
    return seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["quantize", "bench"])
def test_the_page_is_whole(browser, files, kind, width, scheme):
    file = files[kind]
    seen = opened(browser, file, width=width, scheme=scheme)
    assert seen.problems == []
    assert seen.requests == [file.as_uri()]
    charts = seen.tab.eval_on_selector_all(
        ".chart",
        """charts => charts.map(chart => {
            const svg = chart.querySelector("svg").getBoundingClientRect();
            const marks = [...chart.querySelectorAll(
                ".mark-rect path, .mark-symbol path, .mark-area path, .mark-line path")];
            const boxes = marks.map(mark => mark.getBoundingClientRect());
            return {
                inside: svg.right <= chart.getBoundingClientRect().right + 1,
                height: svg.height,
                marks: boxes.filter(box => box.width + box.height > 2).length,
                fills: marks.map(mark => getComputedStyle(mark).fill),
            };
        })""",
    )
    assert len(charts) >= 7
    for chart in charts:
        assert chart["marks"] > 0
        assert chart["height"] > 60
        assert chart["inside"]
        assert not any("var(" in fill for fill in chart["fills"])
    # Nothing is wider than the screen; what is, scrolls in a box of its own.
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = seen.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = seen.tab.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    assert (paper, ink) == {
        "light": ("rgb(255, 255, 255)", "rgb(28, 33, 40)"),
        "dark": ("rgb(18, 22, 27)", "rgb(230, 233, 237)"),
    }[scheme]
    found = Axe().run(seen.tab)
    grave = [
        v["id"] for v in found.response["violations"] if v["impact"] in ("serious", "critical")
    ]
    assert grave == [], found.generate_report()
    assert found.response["passes"]
    seen.tab.context.close()


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
