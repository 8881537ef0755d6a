"""The document of a :class:`~qkit.report.Report`: what quantizing a model came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qkit.report.document import (
    Cell,
    Chart,
    Code,
    Column,
    Document,
    Facts,
    Notes,
    Section,
    Table,
    document,
    section,
)
from qkit.report.report import LayerRow, Report
from qkit.report.sentences import summary, verdict
from qkit.report.text import as_text

# The bars of one chart: more cannot be told apart.
BARS = 40
NO_TIMES = (
    "n/a: single layers were not timed. Without inputs nothing is run, and a runtime runs its file "
    "as a whole."
)
NO_WEIGHTS = "n/a: no weight was rounded to a grid, or its values were not at hand any more."
STEPS = (
    "The least exact ones. Values are divided by the scale of their block (and moved by its zero "
    "point), so that one grid serves all; the marks below are its codes, where they are few. "
    "Heights are shares of the values in one unit of the grid; what rounds to a code is spread "
    "evenly over its unit."
)
ROOFLINE = (
    "roofline: the time that the layer's memory traffic needs at the speed of a copy, or its "
    "multiply-adds at that of a large fp32 product (whichever is longer, both measured in this "
    "run), over the time that it took; integer kernels may pass 100%"
)


def quantization_document(
    report: Report,
    command: str | None = None,
    *,
    files: Mapping[str, int],
    layers: Mapping[str, int],
) -> Document:
    """The document of ``report``, which ``command`` made; the artifact holds ``files`` and, in its
    weights, ``layers`` of so many bytes."""
    return document(
        f"{report.scheme} for {report.target}",
        verdict(report),
        section("remarks", "What to know", Notes(tuple(report.remarks))),
        section("summary", "Summary", Facts(_facts(summary(report)))),
        section("tradeoff", "Size, latency and error", _tradeoff(report)),
        section("layers", "Layers", _layers(report.layers)),
        section("time", "Where the time is", _times(report.details)),
        section("weights", "Weights before and after", *_weights(report.details)),
        section("activations", "Activations", *_activations(report.calibration)),
        section("bytes", "Where the bytes are", *bytes_of(files, layers)),
        section("kernels", "Kernels that ran", _kernels(report)),
        section("training", "Training", records("Epochs", report.training.get("history"))),
        section("recipe", "Recipe", Code("Resolved recipe", as_text(report.recipe))),
        *provenance(report.machine, report.versions, command),
        section("source", "Source", _source(report.source)),
    )


def provenance(
    machine: dict[str, Any], versions: dict[str, str], command: str | None
) -> Iterable[Section | None]:
    """The machine, the versions, and how to do it again: the end of every document."""
    facts = {name: ", ".join(v) if isinstance(v, list) else v for name, v in machine.items()}
    kinds = {"memory_bytes": "bytes"}
    rows = [(name.replace("_", " "), value, kinds.get(name, "count" if isinstance(value, int)
             else "text")) for name, value in facts.items()]  # fmt: skip
    yield section("machine", "Machine and versions", Facts(tuple(rows)), Facts(_facts(versions)))
    yield section("reproduce", "How to reproduce", Code("Command", command or ""))


def records(title: str, rows: Sequence[dict[str, Any]] | None) -> Table | None:
    """A table of equal dicts of numbers."""
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = tuple(
        Column(name.replace("_", " "), "text" if _textual(rows, name) else "number")
        for name in names
    )
    cells = [tuple(_cell(row.get(name)) for name in names) for row in rows]
    return Table(title, columns, tuple(cells))


def _textual(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return any(not isinstance(row.get(name), int | float | None) for row in rows)


def _cell(value: Any) -> Cell:
    return value if isinstance(value, int | float | str | None) else str(value)


def _facts(pairs: dict[str, Any]) -> tuple[tuple[str, Cell, str], ...]:
    return tuple((name, value, "text") for name, value in pairs.items())


def _tradeoff(report: Report) -> Table:
    """The float and the quantized model: as small, as fast and as exact as the other allows."""
    sizes, times = report.size_bytes, report.latency_ms
    found = report.error.get("sqnr_db")
    sqnr: Cell = "exact" if found is None else found
    if report.error.get("level") == "weights":
        sqnr = None
    # Of a runtime's file, the float model is that of the same runtime.
    first = sizes.get("float", sizes["source"])
    sides: tuple[tuple[str, int, Cell], ...] = (
        ("float", first, "exact"),
        ("quantized", sizes["artifact"], sqnr),
    )
    columns = (
        Column("model"),
        Column("size", "bytes"),
        Column("latency", "milliseconds"),
        Column("10th percentile", "milliseconds"),
        Column("90th percentile", "milliseconds"),
        Column("output SQNR", "decibels"),
    )
    rows = []
    for name, size, exact in sides:
        figures = times.get(name, {})
        rows.append((name, size, *map(figures.get, ("median", "p10", "p90")), exact))
    charts = (Chart("points", "Size and latency", "size", "latency", "model"),) if times else ()
    note = f"latency in {times['runtime']}, {times['threads']} threads" if times else ""
    return Table("Float and quantized model", columns, tuple(rows), note, charts)


def _layers(layers: list[LayerRow]) -> Table:
    """Every layer, the least exact first, then the exact ones, then what was left in float."""
    ranked = sorted(layers, key=_rank)
    columns = (
        Column("layer"),
        Column("kind"),
        Column("shape"),
        Column("parameters", "count"),
        Column("scheme"),
        Column("bits per weight", "bits"),
        Column("weight SQNR", "decibels"),
        Column("algorithm"),
        Column("why, or note"),
    )
    rows = tuple(
        (
            row.name or "(the model)",
            row.kind,
            "x".join(map(str, row.shape)),
            row.parameters,
            row.scheme or "float",
            "" if row.scheme is None else row.bits_per_weight,
            "" if row.scheme is None else ("exact" if row.sqnr_db is None else row.sqnr_db),
            row.algorithm or "",
            row.note or row.reason or "",
        )
        for row in ranked
    )
    inexact = sum(row.sqnr_db is not None for row in layers)
    with_bits = sum(row.bits_per_weight is not None for row in layers)
    charts = [
        Chart("bars", f"Weight SQNR{_of(inexact)}", "weight SQNR", "layer", "scheme",
              min(inexact, BARS)),
        Chart("bars", f"Bits per weight{_of(with_bits)}", "bits per weight", "layer", "scheme",
              min(with_bits, BARS)),
    ]  # fmt: skip
    return Table(
        "All layers, the least exact first",
        columns,
        rows,
        charts=tuple(chart for chart in charts if chart.first),
    )


def _rank(row: LayerRow) -> tuple[bool, float]:
    return row.scheme is None, float("inf") if row.sqnr_db is None else row.sqnr_db


def _of(count: int) -> str:
    """What a chart says of the rows that it leaves out."""
    return f", {BARS} of {count} layers" if count > BARS else ""


def _times(details: dict[str, Any]) -> Table | Notes:
    """Each layer that was timed, the slowest first."""
    rows = sorted(details.get("times", ()), key=lambda row: -row["quantized_ms"])
    if not rows:
        return Notes((NO_TIMES,))
    columns = (
        Column("layer"),
        Column("float", "milliseconds"),
        Column("quantized", "milliseconds"),
        Column("multiply-adds", "count"),
        Column("memory traffic", "bytes"),
        Column("share of the roofline", "share"),
    )
    keys = ("name", "float_ms", "quantized_ms", "multiply_adds", "bytes", "roofline")
    title = f"Time in each quantized layer{_of(len(rows))}"
    return Table(
        "Layers, the slowest first",
        columns,
        tuple(tuple(row[key] for key in keys) for row in rows),
        f"Medians of one call on the inputs, float and quantized model in turn; {ROOFLINE}.",
        (
            Chart("bars", title, "quantized", "layer", first=BARS),
            Chart("bars", f"Share of the roofline{_of(len(rows))}", "share of the roofline",
                  "layer", first=BARS),
        ),
    )  # fmt: skip


def _weights(details: dict[str, Any]) -> Sequence[Table | Notes]:
    """A table and a chart for each :class:`~qkit.report.Distribution`."""
    found = [_histogram(each) for each in details.get("histograms", ())]
    return [Notes((STEPS,)), *found] if found else [Notes((NO_WEIGHTS,))]


def _histogram(found: dict[str, Any]) -> Table:
    columns = (Column("value in steps", "number"), Column("before", "number"),
               Column("after", "number"))  # fmt: skip
    width, first = found["width"], found["first"]
    rows = tuple(
        (round(first + (index + 0.5) * width, 6), before, after)
        for index, (before, after) in enumerate(zip(found["before"], found["after"], strict=True))
    )
    levels = found["levels"]
    grid = (
        f"the codes stand for {len(levels)} values"
        if levels
        else (
            f"the codes stand for {found['count']} values from {found['least']:g} to "
            f"{found['greatest']:g}"
        )
    )
    name = found["name"] or "(the model)"
    return Table(
        name,
        columns,
        rows,
        f"{found['what']}; {grid}",
        (Chart("steps", name, "value in steps", "before", "after", grid=tuple(levels)),),
        folded=True,
    )


def _activations(calibration: dict[str, Any]) -> list[Facts | Table]:
    """What calibration saw, the least exact first."""
    found = calibration.get("activations") or []
    rows = sorted(found, key=lambda row: float("inf") if row["sqnr_db"] is None else row["sqnr_db"])
    names = ("activation", "least", "greatest", "range from", "range to")
    columns = (
        Column(names[0]),
        *(Column(name, "number") for name in names[1:]),
        Column("clipped", "share"),
        Column("outliers", "times"),
        Column("SQNR", "decibels"),
    )
    cells = tuple(
        (row["name"], *row["seen"], *row["range"], row["clipped"], row["outliers"],
         "exact" if row["sqnr_db"] is None else row["sqnr_db"])
        for row in rows
    )  # fmt: skip
    data = [(key, calibration[key], kind) for key, kind in
            (("samples", "count"), ("origin", "text")) if key in calibration]  # fmt: skip
    inexact = sum(row["sqnr_db"] is not None for row in rows)
    charts = (Chart("bars", "SQNR of the least exact", "SQNR", "activation",
                    first=min(BARS, inexact)),) if inexact else ()  # fmt: skip
    table = Table("Learnt ranges, the least exact first", columns, cells, charts=charts)
    drawn = [row["distribution"] for row in rows if row.get("distribution")]
    return [Facts(tuple(data)), table, *map(_histogram, drawn)]  # what STEPS says holds here too


def bytes_of(files: Mapping[str, int], layers: Mapping[str, int]) -> list[Table]:
    """The files of an artifact, and the layers in its weights, the largest first."""
    tables = []
    for name, title, found in (
        ("file", "Files of the artifact", files),
        ("layer", "Weights, by layer", layers),
    ):
        total = sum(found.values())
        ranked = sorted(found.items(), key=lambda item: -item[1])
        rows = tuple((each, count, count / max(total, 1)) for each, count in ranked)
        columns = (Column(name), Column("bytes", "bytes"), Column("share", "share"))
        chart = Chart("bars", title + _of(len(rows)), "bytes", name, first=BARS)
        tables.append(Table(title, columns, rows, charts=(chart,)))
    return tables


def _kernels(report: Report) -> Table:
    columns = (Column("kernel"), Column("calls in one forward pass", "count"))
    return Table("Counted, not assumed", columns, tuple(report.kernels.items()))


def _source(source: dict[str, Any]) -> Table | None:
    files = source.get("files") or {}
    columns = (Column("file"), Column("bytes", "count"), Column("sha256"))
    rows = tuple((name, facts["bytes"], facts.get("sha256")) for name, facts in files.items())
    return Table(f"{source.get('path')} ({source.get('kind')})", columns, rows)
