"""Plain JSON data, read strictly: what is missing, unknown or of another type is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qkit.errors import InputError, UsageError

# Strings end up inside quotes in source that torch generates and runs, so none may end those.
PLAIN = re.compile(r"[^'\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")


def take(data: object, what: str, kinds: Mapping[str, type]) -> list[Any]:
    """The values of exactly the fields ``kinds`` of ``data``, in that order.

    ``what`` names the thing that ``data`` describes. The kind ``object`` stands for any value.
    Raises :class:`~qkit.errors.InputError` for anything else; True is not an integer here.
    """
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        raise InputError(
            f"not the description of a {what}",
            got=", ".join(map(repr, data)) if isinstance(data, dict) else show(data),
            wanted=f"the fields {', '.join(kinds)}" if kinds else "no fields",
        )
    for name, kind in kinds.items():
        if kind is not object and type(data[name]) is not kind:
            raise InputError(
                f"the field {name!r} of a {what} has another type",
                got=show(data[name]),
                wanted=kind.__name__,
            )
    return [data[name] for name in kinds]


def choose(value: object, what: str, known: Mapping[str, Any]) -> Any:
    """``known[value]``; :class:`~qkit.errors.InputError` for a value that is not among them."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"unknown {what}", got=show(value), wanted=", ".join(known))
    return known[value]


def show(value: object) -> str:
    """``value`` for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def from_a_file(what: str) -> Iterator[None]:
    """What would be a wrong request of a user is a wrong input where a file says it."""
    try:
        yield
    except UsageError as error:
        raise InputError(f"not a possible {what}: {error}") from error
