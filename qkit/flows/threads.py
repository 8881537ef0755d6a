"""Independent jobs on threads, which end with their caller."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")
# How often the caller comes to show the progress.
TICK_SECONDS = 0.1


def finished(
    jobs: Mapping[str, Callable[[], T]], workers: int, stop: Event
) -> Generator[tuple[str, T] | None]:
    """The names and results of ``jobs``, as ``workers`` threads finish them.

    None comes whenever :data:`TICK_SECONDS` have passed without one. What a job raises is raised
    here. Then, and when the iterator is closed, ``stop`` is set, which the jobs must heed, and
    waits for them. Each thread has one thread of torch's: several that wait for each other at
    every call would share the cores badly.
    """
    queue: SimpleQueue[Future[T]] = SimpleQueue()
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        names = {pool.submit(job): name for name, job in jobs.items()}
        for future in names:
            future.add_done_callback(queue.put)
        left = len(names)
        while left:
            try:
                future = queue.get(timeout=TICK_SECONDS)
            except Empty:
                yield None
                continue
            left -= 1
            yield names[future], future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # also of threads that are still to come
