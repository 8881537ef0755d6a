"""The hashes of the files of a source, found beside the work that reads the same files.

Whoever reads second finds the bytes in the system's cache, if it is not far behind: a source that
is larger than memory comes from the disk once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import Any

from qkit.models.loaded import facts_of

# How many bytes hashing may be ahead of the work.
AHEAD = 1 << 28
PAUSE_SECONDS = 0.01


@contextmanager
def hashing(
    files: Sequence[Path], workers: int, reached: Callable[[], float]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that waits for the facts of all ``files``: threads find them inside the block.

    ``reached`` tells how many bytes of the files, in their order, the work has read; infinity when
    it is done.
    """
    stop = Event()

    def go_on(done: int) -> bool:
        while done > reached() + AHEAD and not stop.is_set():
            stop.wait(PAUSE_SECONDS)
        return not stop.is_set()

    def facts(path: Path, start: int) -> dict[str, Any]:
        return facts_of([path], lambda done: go_on(start + done))

    starts = accumulate((path.stat().st_size for path in files[:-1]), initial=0)
    with ThreadPoolExecutor(workers) as pool:
        try:
            found = [pool.submit(facts, *each) for each in zip(files, starts, strict=True)]
            yield lambda: {name: facts for each in found for name, facts in each.result().items()}
        finally:
            stop.set()
