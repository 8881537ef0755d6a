"""Reports as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any


def as_text(data: Any) -> str:
    """Plain data as JSON (strict: no NaN, no infinity)."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def size(count: float) -> str:
    """Bytes with a decimal unit.

    >>> size(950), size(1_234_000)
    ('950 B', '1.23 MB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.3g} {units[0]}"


def duration(milliseconds: float) -> str:
    """A time with a unit.

    >>> duration(0.01234), duration(12.34), duration(12340)
    ('12.3 us', '12.3 ms', '12.3 s')
    """
    for factor, unit in ((1000, "us"), (1, "ms")):
        if milliseconds * factor < 999.5:
            return f"{milliseconds * factor:.3g} {unit}"
    return f"{milliseconds / 1000:.3g} s"


def rate(value: float) -> str:
    """So many in a second.

    >>> rate(12345.6), rate(1.2345)
    ('12,346', '1.23')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def decibels(value: float | None, *, exact: str = "exact") -> str:
    """An SQNR; None means that there is no error."""
    return exact if value is None else f"{value:.1f} dB"


def largest(value: float | None) -> str:
    """A largest error; JSON has no infinity and says None."""
    return "infinite" if value is None else f"{value:.3g}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a cell may hold anything."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
