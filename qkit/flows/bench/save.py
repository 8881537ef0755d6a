"""The folder of a bench: ``bench.json``, and ``bench.md`` with the same figures."""

from __future__ import annotations

from pathlib import Path

from qkit.report.bench import BenchReport
from qkit.report.bench_text import as_markdown
from qkit.targets.staging import BENCH, check_destination, staged

MARKDOWN = "bench.md"


def check_bench_destination(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written, before anything is measured."""
    check_destination(Path(out), overwrite=overwrite)


def save_bench(report: BenchReport, out: str | Path, *, overwrite: bool = False) -> None:
    """Write ``report`` to the folder ``out``, whole or not at all.

    Raises :class:`~qkit.errors.UsageError` if it exists (and is not one of ours to overwrite), and
    :class:`~qkit.errors.OutputError` if it cannot be written.
    """
    with staged(Path(out), overwrite=overwrite) as folder:
        (folder / BENCH).write_text(report.dumps(), encoding="utf-8")
        (folder / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
