"""Documents as Markdown (CommonMark with GitHub's tables)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qkit.report.document import MAX_ROWS, Block, Code, Document, Facts, Notes, Table
from qkit.report.words import show

# What would be a tag, emphasis, a link, code or a cell's border in a line of text.
_SPECIAL = re.compile(r"([\\`*_\[\]<&|~])")


def to_markdown(document: Document) -> str:
    """The document as text."""
    lines = [f"# {plain(document.title)}", "", *_items(document.verdict)]
    for section in document.sections:
        lines += ["", f"## {plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that shows as itself, on one line.

    >>> plain("a_b <i> |")
    'a\\\\_b \\\\<i> \\\\|'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Notes):
        yield from _items(block.items)
    elif isinstance(block, Facts):
        yield from _grid(("", ""), [(name, show(value, kind)) for name, value, kind in block.rows])
    elif isinstance(block, Code):
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", block.text)), 3)
        yield from (f"**{plain(block.title)}**", "", fence, *block.text.splitlines(), fence)
    else:
        yield from _table(block)


def _items(items: Sequence[str]) -> list[str]:
    return [f"- {plain(item)}" for item in items]


def _table(table: Table) -> Iterator[str]:
    yield from (f"**{plain(table.title)}**", "")
    if table.note:
        yield from (plain(table.note), "")
    kinds = [column.kind for column in table.columns]
    rows = [list(map(show, row, kinds)) for row in table.rows[:MAX_ROWS]]
    numbers = [column.kind != "text" for column in table.columns]
    yield from _grid([column.name for column in table.columns], rows, numbers)
    if len(table.rows) > MAX_ROWS:
        yield from ("", f"{len(table.rows) - MAX_ROWS:,} more rows are in the JSON.")


def _grid(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool] = ()
) -> Iterator[str]:
    yield _line(head)
    right = numbers or [False] * len(head)
    yield "| " + " | ".join("---:" if number else "---" for number in right) + " |"
    yield from map(_line, rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(plain, cells)) + " |"
