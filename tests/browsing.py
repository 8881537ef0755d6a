"""Pages in a real browser: opened, and held against what every page of ours must be."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "() => document.querySelectorAll('.chart:not(.drawn)').length === 0"


def chromium() -> str | None:
    """Where the browser of this machine is."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


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


def whole(browser: Browser, file: Path, width: int, scheme: str, charts_at_least: int = 7) -> None:
    """The page is drawn, without a request or a word on the console, and anyone can read it."""
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
    assert len(charts) >= charts_at_least
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
