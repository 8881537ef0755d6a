"""What a training run leaves to read: metrics as CSV, a plot, a log file, and trackers."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from qkit.report import package_version
from qkit.targets.staging import as_output_error, staged_file, write_whole

LOG_BYTES, LOG_FILES = 1_000_000, 3

Told = Callable[[str], None]


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """``metrics.csv``, a row for each epoch; and ``metrics.png``, where matplotlib is installed."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in history for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with as_output_error(folder):
        write_whole(folder / "metrics.csv", text.getvalue().encode())
    if package_version("matplotlib") is not None:
        _plot(folder / "metrics.png", history)


def _plot(path: Path, history: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses: list[str] = [name for name in ("loss", "val_loss") if name in history[-1]]
    others = [name for name in history[-1] if name.startswith("val_") and name != "val_loss"]
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = [losses, others] if others else [losses]
    epochs = [row["epoch"] for row in history]
    for place, names in enumerate(panels):
        axes: Any = figure.add_subplot(1, len(panels), 1 + place)
        for name in names:
            axes.plot(epochs, [row[name] for row in history], label=name)
        axes.set_xlabel("epoch")
        axes.legend()
    FigureCanvasAgg(figure)
    with as_output_error(path), staged_file(path) as partial:
        figure.savefig(partial, format="png")


@contextmanager
def log_file(folder: Path | None, told: Told) -> Iterator[Told]:
    """``told``, which also writes to ``train.log`` in ``folder``; that file is rotated."""
    if folder is None:
        yield told
        return
    with as_output_error(folder):
        handler = RotatingFileHandler(
            folder / "train.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8"
        )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    # Of its own: what the user's program logs is left alone.
    logger = logging.Logger("qkit.train", logging.INFO)
    logger.addHandler(handler)

    def both(text: str) -> None:
        logger.info(text)
        told(text)

    try:
        yield both
    finally:
        handler.close()


def in_words(row: dict[str, Any]) -> str:
    """A row of the history as a line."""
    shown = {k: v for k, v in row.items() if k not in ("epoch", "step", "peak_rss_bytes")}
    return f"epoch {row['epoch']}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items())
