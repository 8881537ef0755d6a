"""The page says what the tests of its folder have found."""

from __future__ import annotations

import os

from families import page
from families.zoo import FAMILIES

EVERY = {(family, column) for family in FAMILIES for column in page.COLUMNS}


def test_the_page_is_complete_and_says_what_was_found() -> None:
    """Of the cells that this run computed; ``QKIT_WRITE_COVERAGE=1`` writes the page first."""
    if os.environ.get("QKIT_WRITE_COVERAGE") == "1":
        assert page.FOUND.keys() == EVERY, "the page is written from all tests of the folder"
        page.write()
    told = page.read()
    assert told.keys() == EVERY
    wrong = {k: (told[k], page.text(k)) for k in page.FOUND if not page.agrees(told[k], k)}
    assert not wrong, "not what docs/coverage.md says: QKIT_WRITE_COVERAGE=1 writes it"
