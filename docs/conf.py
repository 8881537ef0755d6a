"""How Sphinx builds the documentation: ``python -m sphinx -W docs docs/_build``.

What the pages show of the code is made at build time, in ``docs/_generated``: pictures drawn by
qkit's own functions, tables from ``benchmarks/results``, the list of the API.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
GENERATED = DOCS / "_generated"
sys.path.insert(0, str(DOCS / "site"))

project = "qkit"
copyright = "The qkit authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated"]
root_doc = "index"
myst_heading_anchors = 3
smartquotes = False  # it makes one dash of the two of an option

# No fonts and scripts of others: furo has none, and its icons are in its pages.
html_theme = "furo"
html_title = "qkit"
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80


def generate(app: Any) -> None:
    """Make what the pages include."""
    import api
    import decision
    import pictures

    pictures.draw(GENERATED / "pictures")
    texts = decision.pieces() | {"api": api.listing()}
    for name, text in texts.items():
        (GENERATED / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
