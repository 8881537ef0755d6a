"""The figures of ``qkit bench`` as tables of words: one home for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qkit.report.bench import BenchReport, Contender, Difference, Timing
from qkit.report.text import decibels, duration, largest, markdown_table, rate, size

UNKNOWN = "n/a"


@dataclass(frozen=True)
class Grid:
    """A table with a title; all cells are text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(report: BenchReport) -> list[Grid]:
    """What each contender is and costs, how good it is, how long it takes, what runs in it."""
    return [_costs(report), _outputs(report), _times(report), _kernels(report)]


def _costs(report: BenchReport) -> Grid:
    shown: dict[str, Callable[[Contender], str]] = {
        "contender": lambda c: c.name,
        "run by": lambda c: c.runtime or UNKNOWN,
        "scheme": lambda c: c.scheme or "",
        "size": lambda c: _known(c.size_bytes, size),
        "load": lambda c: _known(c.load_ms, duration),
        "first call": lambda c: _known(c.cold_start_ms, duration),
        "peak memory": lambda c: _known(c.peak_memory_bytes, size),
        "before loading": lambda c: _known(c.base_memory_bytes, size),
    }
    return _grid("Contenders", shown, report)


def _outputs(report: BenchReport) -> Grid:
    shown: dict[str, Callable[[Contender], str]] = {
        "outputs of": lambda c: c.name,
        "SQNR": lambda c: _known(c.error, _sqnr),
        "cosine": lambda c: _known(c.error, lambda e: f"{e.cosine:.6f}"),
        "max error": lambda c: _known(c.error, lambda e: largest(e.max_abs)),
        "top-1": lambda c: _known(c.error and c.error.top1_agreement, lambda x: f"{x:.2%}"),
        "KL": lambda c: _known(c.error and c.error.kl_divergence, lambda x: f"{x:.3g}"),
    }
    if report.metric:
        shown[report.metric] = lambda c: _known(c.metric, lambda x: f"{x:.5g}")
    return _grid(f"Outputs, beside those of {report.baseline}", shown, report)


def _grid(title: str, shown: dict[str, Callable[[Contender], str]], report: BenchReport) -> Grid:
    rows = tuple(tuple(cell(each) for cell in shown.values()) for each in report.contenders)
    return Grid(title, tuple(shown), rows)


def _known(value: object, text: Callable[..., str]) -> str:
    return UNKNOWN if value is None else text(value)


def _sqnr(error: Difference) -> str:
    infinite = error.sqnr_db is None and error.max_abs is None
    return "none" if infinite else decibels(error.sqnr_db)


def _times(report: BenchReport) -> Grid:
    head = ("contender", "batch", "threads", "median", "interval", "p90", "samples/s")
    rows = [
        (
            each.name,
            str(timing.batch),
            str(timing.threads),
            duration(timing.median),
            f"{duration(timing.ci_low)} to {duration(timing.ci_high)}",
            duration(timing.p90),
            rate(timing.throughput),
            _speed(report, each, timing),
        )
        for batch in report.batches
        for threads in report.threads
        for each in report.contenders
        if (timing := each.timing(batch, threads)) is not None
    ]
    return Grid("Latency", (*head, f"speed beside {report.baseline}"), tuple(rows))


def _speed(report: BenchReport, contender: Contender, timing: Timing) -> str:
    if contender.name == report.baseline:
        return "the baseline"
    speed = timing.speed
    if speed is None:
        return UNKNOWN
    return f"{speed.ratio:.2f}x, {speed.low:.2f} to {speed.high:.2f}: {speed.verdict}"


def _kernels(report: BenchReport) -> Grid:
    rows = [
        (each.name, ", ".join(f"{name} x{count}" for name, count in each.kernels.items()))
        for each in report.contenders
        if each.kernels
    ]
    return Grid("Kernels", ("contender", "kernels that it runs"), tuple(rows))


def sentences(report: BenchReport) -> list[str]:
    """What a reader must know beside the tables, the gravest first."""
    found = [f"{each.name} failed: {each.failure}" for each in report.failed]
    found += [f"noise: {reason}" for reason in report.noise.reasons]
    if report.noise.quiet:
        found.append("the machine was quiet")
    else:
        found.append(
            "the machine was not quiet: measure again before you rely on small differences"
        )
    found += [f"{each.name}: {text}" for each in report.contenders for text in each.remarks]
    found += report.remarks
    facts = report.machine
    found.append(
        f"intervals of {report.level:.0%}; fresh processes of each: {report.starts}; inputs: "
        f"{report.inputs.get('origin')}; {facts.get('cpu')}, {facts.get('cores')} cores, "
        f"{facts.get('system')}"
    )
    return [" ".join(line.split()) for line in found]


def as_markdown(report: BenchReport) -> str:
    """The report as Markdown."""
    parts = ["# Benchmark"]
    parts += ["\n".join(f"- {line}" for line in sentences(report))]
    for grid in grids(report):
        if grid.rows:
            parts += [f"## {grid.title}", markdown_table(grid.head, grid.rows)]
    if report.command:
        parts += ["## Again", f"```sh\n{report.command}\n```"]
    return "\n\n".join(parts) + "\n"
