"""The document of a :class:`~qkit.report.bench.BenchReport`: contenders side by side."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from qkit.report.bench import BenchReport, Contender, place
from qkit.report.bench_text import sentences
from qkit.report.document import Cell, Chart, Column, Document, Notes, Table, document, section
from qkit.report.quantization import provenance
from qkit.report.text import decibels, duration, size


def bench_document(report: BenchReport) -> Document:
    """The document of ``report``."""
    return document(
        f"Benchmark beside {report.baseline}",
        verdict(report),
        section("tradeoff", "Size, latency and error", _tradeoff(report)),
        section("remarks", "What to know", Notes(tuple(sentences(report)))),
        section("latency", "Latency", *_latencies(report)),
        section("costs", "Memory, loading and errors", _costs(report)),
        section("kernels", "Kernels that run", _kernels(report)),
        *provenance(dict(report.machine), dict(report.versions), report.command),
    )


def verdict(report: BenchReport) -> list[str]:
    """A sentence for each contender beside the baseline, and what to think of the machine."""
    baseline = next(each for each in report.contenders if each.name == report.baseline)
    said = [_beside(report, each, baseline) for each in report.contenders if each is not baseline]
    quiet = (
        "The machine was quiet."
        if report.noise.quiet
        else ("The machine was not quiet: measure again before you rely on small differences.")
    )
    return [*said, quiet]


def _beside(report: BenchReport, contender: Contender, baseline: Contender) -> str:
    if contender.failure is not None:
        return f"{contender.name} failed: {contender.failure}."
    said = []
    if contender.size_bytes and baseline.size_bytes:
        ratio = baseline.size_bytes / contender.size_bytes
        what = f"{ratio:.2f} times smaller" if ratio > 1 else "not smaller"
        said.append(f"{what} ({size(contender.size_bytes)})")
    first = contender.timing(report.batches[0], report.threads[0])
    if first is not None and first.speed is not None:
        speed = first.speed
        said.append(
            f"{speed.verdict} at {first.place} ({speed.ratio:.2f}x, {speed.low:.2f} to "
            f"{speed.high:.2f}; {duration(first.median)})"
        )
    error = contender.error
    if error is not None:
        infinite = error.sqnr_db is None and error.max_abs is None
        said.append(f"SQNR {'none' if infinite else decibels(error.sqnr_db)}")
    return f"{contender.name}: {', '.join(said) or 'nothing was measured'}."


def _sqnr(contender: Contender) -> Cell:
    error = contender.error
    if error is None:
        return None
    if error.sqnr_db is None:
        return "none" if error.max_abs is None else "exact"
    return error.sqnr_db


def _tradeoff(report: BenchReport) -> Table:
    """Which contenders no other one beats in size, latency and error at once."""
    batch, threads = report.batches[0], report.threads[0]
    points = [(each, _figures(each, batch, threads)) for each in report.contenders]
    columns = (
        Column("contender"),
        Column("size", "bytes"),
        Column("latency", "milliseconds"),
        Column("output SQNR", "decibels"),
        Column("on the frontier"),
    )
    rows: list[tuple[Cell, ...]] = []
    for each, figures in points:
        timing = each.timing(batch, threads)
        latency = None if timing is None else timing.median
        best = None if figures is None else "no" if _beaten(figures, points) else "yes"
        rows.append((each.name, each.size_bytes, latency, _sqnr(each), best))
    note = (
        f"latency at {place(batch, threads)}; a contender is on the frontier unless another is "
        "nowhere worse, and somewhere better; what is exact has no place on an axis of decibels"
    )
    charts = (
        Chart("points", "Size and latency", "size", "latency", "contender"),
        Chart("points", "Size and error", "size", "output SQNR", "contender"),
        Chart("points", "Latency and error", "latency", "output SQNR", "contender"),
    )
    return Table("What each contender trades", columns, tuple(rows), note, charts)


Figures = tuple[float, float, float]


def _beaten(figures: Figures, points: list[tuple[Contender, Figures | None]]) -> bool:
    """Whether another contender is nowhere worse, and somewhere better."""
    others = [other for _, other in points if other is not None and other != figures]
    return any(all(map(operator.le, other, figures)) for other in others)


def _figures(contender: Contender, batch: int, threads: int) -> Figures | None:
    """What should be small: bytes, milliseconds and the error; None if one is not known."""
    timing, sqnr = contender.timing(batch, threads), _sqnr(contender)
    if contender.size_bytes is None or timing is None or sqnr is None:
        return None
    error = {"exact": -math.inf, "none": math.inf}.get(str(sqnr))
    return contender.size_bytes, timing.median, -float(sqnr) if error is None else error


def _latencies(report: BenchReport) -> list[Table]:
    return [_latency(report, b, t) for b in report.batches for t in report.threads]


def _latency(report: BenchReport, batch: int, threads: int) -> Table:
    columns = (
        Column("contender"),
        Column("median", "milliseconds"),
        Column("interval from", "milliseconds"),
        Column("to", "milliseconds"),
        Column("90th percentile", "milliseconds"),
        Column("samples/s", "rate"),
        Column("speed", "times"),
        Column("speed from", "times"),
        Column("speed to", "times"),
        Column("verdict"),
    )
    rows = []
    for each in report.contenders:
        timing = each.timing(batch, threads)
        if timing is None:
            continue
        speed = timing.speed
        beside: tuple[Cell, ...] = (None, None, None, None)
        if each.name == report.baseline:
            beside = ("", "", "", "the baseline")
        elif speed is not None:
            beside = (speed.ratio, speed.low, speed.high, speed.verdict)
        rows.append((each.name, timing.median, timing.ci_low, timing.ci_high, timing.p90,
                     timing.throughput, *beside))  # fmt: skip
    title = f"At {place(batch, threads)}"
    charts = (Chart("bars", f"Median latency, {place(batch, threads)}", "median", "contender"),)
    note = f"intervals of {report.level:.0%}; speed beside {report.baseline}"
    return Table(title, columns, tuple(rows), note, charts if rows else ())


def _costs(report: BenchReport) -> Table:
    """What each contender is, what it takes besides time, and its errors."""
    shown: dict[Column, Callable[[Contender], Cell]] = {
        Column("contender"): lambda c: c.name,
        Column("run by"): lambda c: c.runtime,
        Column("scheme"): lambda c: c.scheme or "",
        Column("load", "milliseconds"): lambda c: c.load_ms,
        Column("first call", "milliseconds"): lambda c: c.cold_start_ms,
        Column("peak memory", "bytes"): lambda c: c.peak_memory_bytes,
        Column("before loading", "bytes"): lambda c: c.base_memory_bytes,
        Column("output SQNR", "decibels"): _sqnr,
        Column("cosine", "cosine"): lambda c: _error(c, "cosine"),
        Column("max error", "error"): _largest,
        Column("top-1", "percent"): lambda c: _error(c, "top1_agreement"),
        Column("KL", "error"): lambda c: _error(c, "kl_divergence"),
    }
    if report.metric:
        shown[Column(report.metric, "figure")] = lambda c: c.metric
    rows = tuple(tuple(cell(each) for cell in shown.values()) for each in report.contenders)
    charts = (
        Chart("bars", "Peak memory", "peak memory", "contender"),
        Chart("bars", "Time to load", "load", "contender"),
    )
    return Table(
        "In fresh processes", tuple(shown), rows, "memory with Python, torch and the inputs", charts
    )


def _error(contender: Contender, figure: str) -> float | None:
    return None if contender.error is None else getattr(contender.error, figure)


def _largest(contender: Contender) -> Cell:
    if contender.error is not None and contender.error.max_abs is None:
        return "infinite"
    return _error(contender, "max_abs")


def _kernels(report: BenchReport) -> Table:
    rows = [(c.name, name, count) for c in report.contenders for name, count in c.kernels.items()]
    columns = (Column("contender"), Column("kernel"), Column("calls", "count"))
    return Table("Of one call, or of the program", columns, tuple(rows))
