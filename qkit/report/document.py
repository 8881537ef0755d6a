"""A report as a document: what is said once, and written as HTML, Markdown or JSON.

A document is plain data. Its tables hold the numbers, each with the kind of number that its column
has; the writers show them by :func:`qkit.report.words.show`, and a chart has no numbers of its own
but draws columns of its table. So the formats cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.report.text import as_text
from qkit.report.words import KINDS

FORMAT = 1
# At most so many rows of a table are written for people; the JSON has all of them.
MAX_ROWS = 1000

# A number, text in its place ("exact"), or None where it is not known.
Cell = int | float | str | None


@dataclass(frozen=True)
class Column:
    """A column of a table; ``kind`` is one of :data:`qkit.report.words.KINDS`."""

    name: str
    kind: str = "text"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of number")


@dataclass(frozen=True)
class Chart:
    """A picture of columns of a table, which are named by ``x``, ``y`` and ``by``.

    ``bars`` has a bar for each row: its name ``y``, its length ``x``, its colour ``by``.
    ``points`` has a point for each row at ``x`` and ``y``, called by the column ``by``.
    ``steps`` draws the columns ``y`` and ``by`` over ``x`` as the outlines of histograms, and a
    mark below at each of ``grid``. ``first`` draws the first rows only.
    """

    kind: str
    title: str
    x: str
    y: str
    by: str | None = None
    first: int | None = None
    grid: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of cells. ``folded`` says that most readers look at the charts alone."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    charts: tuple[Chart, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of {self.title!r} is not as long as the head")
        for chart in self.charts:
            for name in filter(None, (chart.x, chart.y, chart.by)):
                self.index(name)

    def index(self, name: str) -> int:
        """The place of a column."""
        return [column.name for column in self.columns].index(name)


@dataclass(frozen=True)
class Facts:
    """Names with a value each, and the kind that it is of."""

    rows: tuple[tuple[str, Cell, str], ...]


@dataclass(frozen=True)
class Notes:
    """Plain sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text for machines, kept as it is: a command, JSON."""

    title: str
    text: str


Block = Table | Facts | Notes | Code


@dataclass(frozen=True)
class Section:
    """A part with a heading; ``name`` is what links to it say."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report: its ``verdict`` in sentences, then the sections."""

    title: str
    verdict: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """This document as plain data: cells are the numbers themselves."""
        sections = [
            {
                "name": section.name,
                "title": section.title,
                "blocks": [
                    {"type": type(block).__name__.lower()} | asdict(block)
                    for block in section.blocks
                ],
            }
            for section in self.sections
        ]
        head = {"format": FORMAT, "title": self.title, "verdict": list(self.verdict)}
        return head | {"sections": sections}

    def dumps(self) -> str:
        """This document as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())


def section(name: str, title: str, *blocks: Block | None) -> Section | None:
    """A section of the blocks that say something; None if none does."""
    said = tuple(block for block in blocks if block is not None and _says(block))
    return Section(name, title, said) if said else None


def _says(block: Block) -> bool:
    if isinstance(block, Code):
        return bool(block.text)
    return bool(block.items if isinstance(block, Notes) else block.rows)


def document(title: str, verdict: Sequence[str], *sections: Section | None) -> Document:
    """A document of the sections that there are."""
    return Document(title, tuple(verdict), tuple(s for s in sections if s is not None))
