"""Terminal tables; the numbers are the report's, nothing is computed here but units."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from qkit.flows import Comparison, Node, PerLayer, RatePoint
from qkit.flows.compress import Ledger
from qkit.report import LayerRow, Report
from qkit.report.distill import DistillReport
from qkit.report.pruning import PruneReport
from qkit.report.sentences import latency, summary, verified
from qkit.report.text import decibels, largest, size

MAX_ROWS = 60


def console() -> Console:
    """Standard output; as wide as needed where it is not a terminal, so that nothing is cut."""
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, width=160)


def grid() -> Table:
    """A table without lines, as all of the command are."""
    return Table(box=None, header_style="bold", pad_edge=False)


def print_report(report: Report) -> None:
    """The layers, then the totals and the verdict."""
    out = console()
    out.print(_layers(report.layers))
    if activations := report.calibration.get("activations"):
        out.print(_activations(activations))
    out.print(_pairs(summary(report)))
    for remark in report.remarks:
        out.print(f"note: {remark}")


def _layers(rows: list[LayerRow]) -> Table:
    table = grid()
    for name in ("layer", "kind", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("params", "scheme", "bits/weight", "SQNR"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why, or note", overflow="fold")
    shown = rows if len(rows) <= MAX_ROWS else rows[: MAX_ROWS // 2] + rows[-MAX_ROWS // 2 :]
    for index, row in enumerate(shown):
        if len(shown) < len(rows) and index == MAX_ROWS // 2:
            table.add_row(f"... {len(rows) - len(shown)} more (--json lists all)")
        done = row.scheme is not None
        table.add_row(
            row.name or "(the model)",
            row.kind,
            "x".join(map(str, row.shape)),
            f"{row.parameters:,}",
            row.scheme or "float",
            f"{row.bits_per_weight:.2f}" if row.bits_per_weight is not None else "",
            decibels(row.sqnr_db) if done else "",
            row.note or row.reason or "",
            style=None if done else "dim",
        )
    return table


def _activations(rows: list[dict[str, Any]]) -> Table:
    """The ranges of activations, the least exact first."""
    table = grid()
    table.add_column("activation", overflow="fold")
    for name in ("least", "greatest", "range", "clipped", "outliers", "SQNR"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=_sqnr_of)[:MAX_ROWS]:
        table.add_row(
            row["name"],
            *(f"{value:.4g}" for value in row["seen"]),
            f"[{row['range'][0]:.4g}, {row['range'][1]:.4g}]",
            f"{row['clipped']:.4%}",
            f"{row['outliers']:.1f}x",
            decibels(row["sqnr_db"]),
        )
    return table


def _sqnr_of(row: dict[str, Any]) -> float:
    return float("inf") if row["sqnr_db"] is None else float(row["sqnr_db"])


def _pairs(lines: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, text)
    return table


def print_pruning(report: PruneReport) -> None:
    """The groups, then the totals and the verdict."""
    out = console()
    table = grid()
    table.add_column("group", overflow="fold")
    for name in ("units", "kept", "rows of each"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.groups[:MAX_ROWS]:
        table.add_row(row.name, str(row.units), str(row.kept), str(row.rows))
    if len(report.groups) > MAX_ROWS:
        table.add_row(f"... {len(report.groups) - MAX_ROWS} more (--json lists all)")
    out.print(table)
    lines = {}
    for key, name in (("macs", "multiply-adds"), ("params", "parameters")):
        lines[name] = f"{report.before[key]:,} -> {report.after[key]:,} ({report.ratio[key]:.3f}x)"
    sizes = (size(report.before["bytes"]), size(report.after["bytes"]))
    lines["tensors"] = f"{sizes[0]} -> {sizes[1]} ({report.ratio['bytes']:.3f}x)"
    error = report.error
    lines["outputs"] = f"cosine {error['cosine']:.6f} to those before (inputs {error['inputs']})"
    if report.latency_ms:
        lines["latency"] = latency(report.latency_ms, "before", "after")
    lines["verified"] = verified(report.verification)
    lines["cost"] = f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"
    if report.artifact:
        lines["artifact"] = report.artifact
    out.print(_pairs(lines))
    for remark in report.remarks:
        out.print(f"note: {remark}")


def print_distillation(report: DistillReport) -> None:
    """The metrics of both, then the totals and the verdict."""
    lines = {"parameters": f"{report.before['params']:,} -> {report.after['params']:,}"}
    for name, values in report.metrics.items():
        lines[name] = ", ".join(f"{key} {value:g}" for key, value in values.items())
    done = report.training
    lines["training"] = f"{len(done['history'])} epochs, the best was {done['best_epoch']}"
    lines["verified"] = verified(report.verification)
    lines["cost"] = f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"
    if report.artifact:
        lines["artifact"] = report.artifact
    out = console()
    out.print(_pairs(lines))
    for remark in report.remarks:
        out.print(f"note: {remark}")


def print_ledger(ledger: Ledger) -> None:
    """A row for each step, with the change from the first, then the verdict."""
    out, first = console(), ledger.rows[0]
    table = grid()
    table.add_column("after")
    for name in ("parameters", "not zero", "bytes", "multiply-adds", "latency", *first.metrics):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("took", justify="right")
    for row in ledger.rows:
        table.add_row(
            row.step,
            f"{row.parameters:,}",
            f"{row.nonzeros / max(row.parameters, 1):.1%}",
            f"{size(row.bytes)} ({first.bytes / max(row.bytes, 1):.1f}x)",
            "" if row.multiply_adds is None else f"{row.multiply_adds:,}",
            "" if row.latency_ms is None else f"{row.latency_ms:.3g} ms",
            *(f"{row.metrics[n]:.4g}" if n in row.metrics else "" for n in first.metrics),
            f"{row.seconds:.1f} s",
        )
    out.print(table)
    if ledger.artifact:
        out.print(_pairs({"verified": verified(ledger.verification), "artifact": ledger.artifact}))


def print_comparison(result: Comparison) -> None:
    """The layers, the worst first, then the output."""
    out = console()
    if result.per_layer is not None:
        _print_costs(out, result.per_layer)
        return
    table = grid()
    for name in ("layer", "a", "b", "of"):
        table.add_column(name, overflow="fold")
    for name in ("SQNR", "cosine", "max abs"):
        table.add_column(name, justify="right", no_wrap=True)
    exact = float("inf")
    worst = sorted(
        result.layers, key=lambda d: exact if d.error.sqnr_db is None else d.error.sqnr_db
    )
    for row in worst[:MAX_ROWS]:
        error = row.error
        table.add_row(
            row.name or "(the model)",
            *row.kinds,
            row.what,
            decibels(error.sqnr_db),
            f"{error.cosine:.6f}",
            largest(error.max_abs),
        )
    out.print(table)
    for side, names in (("a", result.only_in_a), ("b", result.only_in_b)):
        if names:
            out.print(f"only in {side}: {', '.join(names[:10])}")
    if result.output is None:
        out.print("the models could not be run, so weights were compared (see --model, --input)")
    else:
        error = result.output
        out.print(
            f"output: SQNR {decibels(error.sqnr_db)}, cosine {error.cosine:.6f}, "
            f"max abs {largest(error.max_abs)} (inputs {result.inputs})",
        )


def _print_costs(out: Console, costs: PerLayer) -> None:
    """What each layer costs, the worst first, and what to leave in float."""
    table = grid()
    for name in ("layer", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("cumulative SQNR", "SQNR alone"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in costs.layers[:MAX_ROWS]:
        figures = (row.cumulative_db, row.isolated_db)
        table.add_row(row.name or "(the model)", row.kind, *map(decibels, figures))
    out.print(table)
    out.print(
        "cumulative: of the layer's output, with all layers quantized; alone: of the model's "
        "output, with this layer only"
    )
    if costs.reproduced is False:
        out.print("note: the artifact was calibrated with other data: its ranges are others")
    out.print(f"output: SQNR {decibels(costs.output.sqnr_db)} (inputs {costs.inputs})")
    if not costs.skip:
        out.print("leaving a quarter of the layers in float would gain less than 1 dB")
        return
    options = " ".join(f"--ignore {shlex.quote(name)}" for name in costs.skip)
    out.print(f"to gain {costs.gain_db:.1f} dB, to {decibels(costs.skip_db)}: {options}")


def print_rates(points: list[RatePoint]) -> None:
    """Each weight under each scheme; rates in bits per weight."""
    table = grid()
    for name in ("weight", "scheme"):
        table.add_column(name, overflow="fold")
    for name in ("stored", "entropy coded", "SQNR", "bound", "above bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        rates = (point.stored, point.coded)
        bounds = (point.bound, point.gap)
        table.add_row(
            point.name,
            point.scheme,
            *(f"{rate:.2f}" for rate in rates),
            decibels(point.sqnr_db),
            *("" if bound is None else f"{bound:.2f}" for bound in bounds),
        )
    out = console()
    out.print(table)
    out.print(
        "bits per weight, scales included; the bound is the least that any code of Gaussian "
        "weights needs for this SQNR"
    )


def print_tree(root: Node, depth: int) -> None:
    """Modules below modules, with their share of the bytes."""
    total = max(root.bytes, 1)

    def label(node: Node, name: str) -> Text:
        types = "/".join(node.dtypes)
        text = Text(f"{name}  ", style="bold")
        text.append(f"{node.kind}  {node.parameters:,} parameters  {size(node.bytes)}", style="")
        text.append(f"  {node.bytes / total:.1%}  {types}", style="cyan")
        text.append(f"  {node.note}" if node.note else "", style="dim")
        return text

    def fill(branch: Tree, node: Node, left: int) -> None:
        for child in node.children:
            if child.parameters or child.bytes:
                below = branch.add(label(child, child.name))
                if left > 1:
                    fill(below, child, left - 1)

    tree = Tree(label(root, "(the model)"))
    fill(tree, root, depth)
    console().print(tree)
