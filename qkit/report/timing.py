"""Latency of several functions side by side: interleaved, so that a drifting machine is fair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: median, 10th and 90th percentile of ``repeats`` calls."""

    median: float
    p10: float
    p90: float
    repeats: int

    def to_json(self) -> dict[str, float]:
        """The figures, rounded to 0.1 microseconds."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 3.0,
    min_repeats: int = 5,
    max_repeats: int = 200,
    warmup: int = 2,
) -> dict[str, Latency]:
    """Time each function; a round calls each of them once, in alternating order.

    Rounds go on for about ``seconds`` (at least ``min_repeats``, at most ``max_repeats``).
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, end = list(functions), time.perf_counter() + seconds
    for repeat in range(max_repeats):
        if repeat >= min_repeats and time.perf_counter() > end:
            break
        for name in order:
            start = time.perf_counter()
            functions[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        order.reverse()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Latency:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return Latency(float(median), float(p10), float(p90), len(values))
