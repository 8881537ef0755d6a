"""The ledger as a picture: what each step bought, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkit.flows.compress.ledger import Ledger
from qkit.targets.staging import as_output_error, staged_file

_PANELS = {
    "size": ("bytes", "parameters", "nonzeros"),
    "work": ("multiply_adds", "latency_ms"),
}


def write_plot(path: Path, ledger: Ledger) -> None:
    """Write a PNG: bytes, parameters and those that are not zero, and multiply-adds and latency, as
    shares of the model that was given (logarithmic), and the metrics, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, first = ledger.rows, ledger.rows[0]
    panels = list(_PANELS) if first.multiply_adds else ["size"]
    names = list(first.metrics)
    figure = Figure(figsize=(4 * (len(panels) + len(names)), 3.2), layout="constrained")
    places = range(len(rows))

    def panel(index: int, title: str) -> Any:
        axes: Any = figure.add_subplot(1, len(panels) + len(names), 1 + index)
        axes.set_title(title)
        axes.set_xticks(places, [row.step for row in rows], rotation=30, ha="right")
        return axes

    for index, title in enumerate(panels):
        axes = panel(index, f"{title}, share of the first")
        for key in _PANELS[title]:
            values = [getattr(row, key) for row in rows]
            if all(values):
                shares = [value / values[0] for value in values]
                axes.plot(places, shares, marker="o", label=key.replace("_", " "))
        axes.set_yscale("log")
        axes.legend()
    for index, name in enumerate(names, len(panels)):
        axes = panel(index, name)
        axes.plot(places, [row.metrics.get(name) for row in rows], marker="o", color="black")
    FigureCanvasAgg(figure)
    with as_output_error(path), staged_file(path) as partial:
        figure.savefig(partial, format="png")
