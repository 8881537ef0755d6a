"""The kinds of numbers in a document, and how each is written for a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qkit.report.text import decibels, duration, rate, size

# What was not measured, or cannot be known.
UNKNOWN = "n/a"


# The kinds of numbers, and how each is written.
KINDS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": "{:,}".format,
    "bytes": size,
    "bits": "{:.2f}".format,
    "decibels": decibels,
    "milliseconds": duration,
    "seconds": "{:.1f} s".format,
    "share": "{:.1%}".format,
    "percent": "{:.2%}".format,
    "cosine": "{:.6f}".format,
    "error": "{:.3g}".format,
    "times": "{:.2f}x".format,
    "number": "{:.4g}".format,
    "figure": "{:.5g}".format,
    "rate": rate,
}


def show(value: object, kind: str) -> str:
    """A value of a document in words; text stands as it is, and None for what is not known.

    >>> show(1500, "bytes"), show(None, "milliseconds"), show("exact", "decibels")
    ('1.5 kB', 'n/a', 'exact')
    """
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else KINDS[kind](value)
