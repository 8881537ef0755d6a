"""Documents as one HTML file that needs nothing else: no network, no files beside it.

The page is filled by Jinja with everything escaped, and its charts are drawn by Vega, which stands
in the file. A content security policy lets the browser run the two scripts of the page, known by
their hashes, and nothing else: neither a script out of a layer's name nor a request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from qkit.errors import MissingExtraError
from qkit.report.charts import vega_lite
from qkit.report.document import MAX_ROWS, Document
from qkit.report.words import show

# What the file holds besides the document: a browser's engine for the charts.
_ENGINE = "window.vegaEmbed = vegaEmbed;"


def check_html() -> None:
    """Raise :class:`~qkit.errors.MissingExtraError` if a package for pages is not installed."""
    for package, module in (("Jinja2", "jinja2"), ("vl-convert-python", "vl_convert")):
        try:
            __import__(module)
        except ImportError as error:
            raise MissingExtraError(package, "report", needed_for="a report in HTML") from error


def to_html(document: Document) -> str:
    """The document as a page."""
    check_html()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "of": lambda block: type(block).__name__}
    scripts = [_asset("vega.js"), _asset("script.js")] if _charts(document) else []
    template = environment.from_string(_asset("page.html"))
    return template.render(
        document=document,
        spec=vega_lite,
        max_rows=MAX_ROWS,
        style=_asset("style.css"),
        scripts=scripts,
        policy=_policy(scripts),
        notices=_asset("notices.txt"),
    )


def _charts(document: Document) -> bool:
    blocks: list[Any] = [block for section in document.sections for block in section.blocks]
    return any(getattr(block, "charts", ()) for block in blocks)


@cache
def _asset(name: str) -> str:
    """A part of the page: a file beside this one, or the charting library."""
    if name == "vega.js":
        import vl_convert

        # A script ends at its first closing tag, also inside of a string.
        engine: str = vl_convert.javascript_bundle(_ENGINE)
        return engine.replace("</script", "<\\/script")
    return (files("qkit.report") / "page" / name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    hashes = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    none = "'none'"
    return f"default-src {none}; style-src 'unsafe-inline'; script-src {allowed or none}"
