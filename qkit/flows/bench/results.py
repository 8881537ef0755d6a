"""From what was found of the contenders to the rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from qkit.errors import InputError
from qkit.flows.bench.campaign import Cell, Findings
from qkit.flows.bench.plan import Plan
from qkit.report import compare, compare_classes
from qkit.report.bench import Contender, Difference, Speed, Timing, place
from qkit.report.statistics import MIN_ROUNDS, median_interval, ratio_interval
from qkit.targets.weights import read_tensors

Calls = list[list[Tensor]]


def baseline_series(found: Findings) -> dict[str, np.ndarray[Any, Any]]:
    """The series of a contender by where they were measured, in words."""
    return {
        place(*at): _series(cell, cell.rounds) for at, cell in found.cells.items() if _full(cell)
    }


def _full(cell: Cell) -> bool:
    """Whether there is a series that says anything."""
    return bool(cell.rounds) and _series(cell, cell.rounds).size >= MIN_ROUNDS


def _series(cell: Cell, starts: Iterable[int]) -> np.ndarray[Any, Any]:
    """The rounds of a cell in some of its starts, cut to the shortest."""
    found = [cell.rounds[start] for start in starts]
    length = min(map(len, found))
    return np.array([each[:length] for each in found])


def contenders(
    chosen: Sequence[Plan],
    found: Mapping[str, Findings],
    reference: str,
    count: int,
    batch: int,
) -> tuple[Contender, ...]:
    """What the report says of each contender.

    Errors are those of ``count`` samples, ``batch`` in a call, against the outputs of the
    contender ``reference``.
    """
    base = found[reference]
    wanted = _outputs(base)
    return tuple(
        _row(
            plan,
            found[plan.name],
            None if plan.name == reference else base,
            _against(wanted, found[plan.name], count, batch),
        )
        for plan in chosen
    )


def _row(
    plan: Plan, own: Findings, base: Findings | None, error: Difference | str | None
) -> Contender:
    """The row of one contender beside ``base``, if that is another one; an ``error`` in words says
    why there is none."""
    told = [*own.remarks, *([error] if isinstance(error, str) else [])]
    facts = {key: values for key, values in own.facts.items() if values}
    return Contender(
        name=plan.name,
        kind=plan.kind,
        path=str(plan.path),
        size_bytes=plan.size_bytes,
        scheme=plan.scheme,
        runtime=facts["runtime"][0] if "runtime" in facts else None,
        load_ms=_middle(facts.get("load_ms")),
        cold_start_ms=_middle(facts.get("cold_start_ms")),
        timings=_timings(own, base),
        peak_memory_bytes=max(facts.get("peak_memory_bytes", []), default=None),
        base_memory_bytes=max(facts.get("base_memory_bytes", []), default=None),
        error=None if isinstance(error, str) else error,
        metric=own.metric,
        kernels=own.kernels,
        remarks=tuple(told),
        failure=own.failure,
    )


def _middle(values: Sequence[float] | None) -> float | None:
    return round(median(values), 4) if values else None


def _timings(own: Findings, base: Findings | None) -> tuple[Timing, ...]:
    """The latency at each place that was measured, beside ``base``, if that is another one."""
    rows = []
    for at, cell in own.cells.items():
        if not _full(cell):
            continue
        series = _series(cell, cell.rounds)
        within = median_interval(series).widened()
        rows.append(
            Timing(
                batch=at[0],
                threads=at[1],
                median=round(within.value, 5),
                p90=round(float(np.percentile(cell.calls, 90)), 5),
                ci_low=round(within.low, 5),
                ci_high=round(within.high, 5),
                n=len(cell.calls),
                throughput=round(at[0] / within.value * 1e3, 3),
                speed=None if base is None else _speed(cell, base.cells.get(at)),
                rounds=tuple(tuple(round(float(x), 5) for x in each) for each in series),
            )
        )
    return tuple(rows)


def _speed(own: Cell, base: Cell | None) -> Speed | None:
    """How many times as fast, of the starts in which both were timed."""
    both = [] if base is None else [start for start in own.rounds if start in base.rounds]
    if base is None or not both:
        return None
    pair = [_series(base, both), _series(own, both)]
    length = min(each.shape[1] for each in pair)
    if length * len(both) < MIN_ROUNDS:
        return None
    return Speed.of(ratio_interval(*(each[:, :length] for each in pair)).widened())


def _outputs(found: Findings) -> Calls | None:
    """What came out, call by call."""
    if found.outputs is None:
        return None
    calls: dict[int, dict[int, Tensor]] = {}
    for key, tensor in read_tensors(found.outputs).items():
        call, _, index = key.partition(".")
        calls.setdefault(int(call), {})[int(index)] = tensor
    return [[calls[i][j] for j in range(len(calls[i]))] for i in range(len(calls))]


def _against(
    wanted: Calls | None, own: Findings, count: int, batch: int
) -> Difference | str | None:
    """The error of what came out; why there is none, where outputs are not alike."""
    got = _outputs(own)
    if wanted is None or got is None:
        return None
    try:
        stats = compare([t for call in wanted for t in call], [t for call in got for t in call])
    except InputError as error:
        return f"its outputs cannot be compared with the baseline's: {error}"
    figures: dict[str, Any] = stats.to_json()
    classes = compare_classes([call[0] for call in wanted], [call[0] for call in got])
    return Difference(
        **figures,
        top1_agreement=None if classes is None else classes.top1_agreement,
        kl_divergence=None if classes is None else classes.kl_divergence,
        samples=count,
        batch=batch,
    )
