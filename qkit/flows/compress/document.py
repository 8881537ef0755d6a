"""The document of a :class:`~qkit.flows.compress.Ledger`: what each step of a recipe came to."""

from __future__ import annotations

from collections.abc import Mapping

from qkit.flows.compress.ledger import Ledger, Row
from qkit.flows.compress.steps import STEPS
from qkit.report.document import Chart, Code, Column, Document, Facts, Table, document, section
from qkit.report.quantization import bytes_of, provenance
from qkit.report.sentences import smaller, trust, verified
from qkit.report.text import as_text, duration

SEPARATE = (
    "latency in torch eager (of an exported file in its runtime), each step's when it was done: "
    "the rows were not measured side by side"
)


def ledger_document(
    ledger: Ledger,
    command: str | None = None,
    *,
    files: Mapping[str, int],
    layers: Mapping[str, int],
) -> Document:
    """The document of ``ledger``, which ``command`` made; the artifact holds ``files`` and, in its
    weights, ``layers`` of so many bytes."""
    facts = [("steps", " -> ".join(row.step for row in ledger.rows[1:]), "text")]
    if ledger.artifact:
        facts += [("artifact", ledger.artifact, "text")]
        facts += [("verified", verified(ledger.verification), "text")]
    return document(
        f"Compressed in {len(ledger.rows) - 1} steps",
        _verdict(ledger),
        section("summary", "Summary", Facts(tuple(facts))),
        section("ledger", "Ledger of the steps", _steps(ledger)),
        section("bytes", "Where the bytes are", *bytes_of(files, layers)),
        section("recipe", "Recipe", Code("Resolved recipe", as_text(ledger.recipe))),
        *provenance(ledger.machine, ledger.versions, command),
    )


def _verdict(ledger: Ledger) -> list[str]:
    first, last = ledger.rows[0], ledger.rows[-1]
    said = [smaller(first.bytes, last.bytes)]
    if first.latency_ms is None or last.latency_ms is None:
        said.append("Speed was not measured.")
    else:
        times = f"{duration(first.latency_ms)} -> {duration(last.latency_ms)}"
        served = last.step in STEPS and STEPS[last.step].write is not None
        where = (
            f"({ledger.verification['runtime']} after torch eager)"
            if served
            else ("in torch eager")
        )
        said.append(f"{first.latency_ms / last.latency_ms:.2f}x the speed {where}: {times}, "
                    "not measured side by side.")  # fmt: skip
    if first.metrics and last.metrics:
        said.append(
            ", ".join(
                f"{n} {v:.4g} -> {last.metrics[n]:.4g}"
                for n, v in first.metrics.items()
                if n in last.metrics
            )
            + " on the validation data."
        )
    else:
        said.append("The loss was not measured: the recipe names no validation data (val).")
    return [*said, trust(ledger.verification)]


def _steps(ledger: Ledger) -> Table:
    first = ledger.rows[0]
    columns = (
        Column("after"),
        Column("parameters", "count"),
        Column("not zero", "share"),
        Column("bytes", "bytes"),
        Column("smaller", "times"),
        Column("multiply-adds", "count"),
        Column("latency", "milliseconds"),
        *(Column(name, "number") for name in first.metrics),
        Column("took", "seconds"),
    )
    rows = tuple(_row(number, row, first) for number, row in enumerate(ledger.rows))
    charts = [Chart("bars", "Bytes after each step", "bytes", "after")]
    if first.latency_ms is not None:
        charts.append(Chart("points", "Size and latency", "bytes", "latency", "after"))
    charts += [
        Chart("points", f"Size and {name}", "bytes", name, "after") for name in first.metrics
    ]
    return Table("A row for each step", columns, rows, SEPARATE, tuple(charts))


def _row(number: int, row: Row, first: Row) -> tuple[int | float | str | None, ...]:
    return (
        f"{number} {row.step}" if number else row.step,
        row.parameters,
        row.nonzeros / max(row.parameters, 1),
        row.bytes,
        first.bytes / max(row.bytes, 1),
        row.multiply_adds,
        row.latency_ms,
        *(row.metrics.get(name) for name in first.metrics),
        row.seconds,
    )
