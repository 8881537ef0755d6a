"""The journal of a long run: which parts of its output are written, so that a killed run goes on.

It lies in the staging folder as ``.journal``, one JSON value on each line: first what the run is
made from (a run that differs in it must not go on with the same files), then ``[name, facts]`` for
each part, after the part itself is on the disk. A last line that is cut short does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

JOURNAL = ".journal"


class Journal:
    """The journal in ``folder`` of a run that is made from ``origin`` (plain JSON data).

    ``done`` holds the facts of the parts that an earlier run has written, by name. Parts that are
    :meth:`add`-ed count once :meth:`commit` has returned.
    """

    def __init__(self, folder: Path, origin: dict[str, Any]) -> None:
        self._path = folder / JOURNAL
        self._waiting: list[str] = []
        found = read_journal(folder)
        self.done: dict[str, Any] = {}
        if found is None:
            self._write("w", [json.dumps(origin)])
        else:
            self.done = found[1]
            # What was cut short is taken away, so that the next line does not continue it.
            text = self._path.read_bytes()
            os.truncate(self._path, text.rfind(b"\n") + 1)

    def add(self, name: str, facts: object) -> None:
        """The part ``name`` is written; ``facts`` are what the run must know of it later."""
        self._waiting.append(json.dumps([name, facts]))

    def commit(self) -> None:
        """Put what was added on the disk. The parts themselves must be there already."""
        lines, self._waiting = self._waiting, []
        if lines:
            self._write("a", lines)

    def remove(self) -> None:
        """The run has come to its end."""
        self._path.unlink()

    def _write(self, mode: str, lines: list[str]) -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def read_journal(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What the run in ``folder`` was made from, and the facts of its parts; None without a journal.

    A journal that is damaged counts as none: then the run is started anew.
    """
    try:
        text = (folder / JOURNAL).read_text(encoding="utf-8")
        origin, *parts = map(json.loads, text.split("\n")[:-1])
        return origin, dict(parts)
    except (OSError, ValueError, TypeError):
        return None
