"""Reading documents back: the cells of tables, out of a page and out of Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from qkit.report import BenchReport, LayerRow, Report
from qkit.report.bench import Contender, Difference, Speed, Timing
from qkit.report.noise import Noise

# A layer's name may be anything; this one tries the page, the Markdown and the script around it.
HOSTILE = 'a<script>alert("x")</script>|`b`_*[c](d)&amp;</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """The tags of a page, its links to elsewhere, and the texts of its tables, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.facts: list[str] = []
        self._cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "dd", "dt"):
            self._cell = ""

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell or "")
        elif tag in ("dd", "dt"):
            self.facts.append(self._cell or "")
        if tag in ("td", "th", "dd", "dt"):
            self._cell = None


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, their texts unescaped; the line under the head is left out."""
    tables: list[list[list[str]]] = []
    fenced = inside = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced or not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        if "-" in line and set(line) <= set("|-: "):
            continue
        cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        tables[-1].append([re.sub(r"\\(.)", r"\1", cell) for cell in cells])
    return tables


def report(**more: Any) -> Report:
    """A report with everything that a document shows; its numbers are made up."""
    rows = [
        LayerRow("conv", "Conv2d", (8, 3, 3, 3), 216, "w4a16-g32", None, "rtn", 5.0, 18.25, None),
        LayerRow(HOSTILE, "Linear", (10, 128), 1290, "w4a16-g32", None, "gptq", 4.5, 21.5, "tied"),
        LayerRow("exact", "Linear", (1, 1), 2, "w4a16-g32", None, "rtn", 4.0, None, None),
        LayerRow("norm", "LayerNorm", (10,), 20, reason="normalisation stays in float"),
    ]
    histogram = {
        "name": HOSTILE, "what": "int4", "first": -8.0, "width": 4.0, "least": -7.0,
        "greatest": 7.0,
        "before": (0.0, 0.125, 0.125, 0.0), "after": (0.0, 0.1, 0.15, 0.0),
        "count": 15, "levels": tuple(map(float, range(-7, 8))),
    }  # fmt: skip
    side = {"median": 2.0, "p10": 1.9, "p90": 2.1, "repeats": 9}
    times = {"multiply_adds": 1280, "bytes": 2048, "roofline": 0.25}
    check = {
        "status": "verified", "bit_identical": True, "runtime": "qkit", "fresh_process": True,
        "checks": [{"way": "architecture"}],
    }  # fmt: skip
    activation = {
        "name": f"{HOSTILE} (relu)", "seen": (-1.0, 2.0), "range": (-1.5, 2.5), "clipped": 0.0125,
        "outliers": 3.0, "sqnr_db": 30.5, "distribution": histogram,
    }  # fmt: skip
    fields: dict[str, Any] = {
        "layers": rows,
        "coverage": {
            "fraction": 0.9, "parameters": 1528, "layers_quantized": 3, "layers_left": 1,
        },
        "size_bytes": {"source": 6112, "artifact": 1024, "ratio": 0.1675, "folder": 4096},
        "error": {"sqnr_db": 20.0, "cosine": 0.995, "max_abs": 0.5, "level": "model",
                  "inputs": "x.npz"},
        "latency_ms": {
            "float": side, "quantized": side | {"median": 1.0, "p10": 0.9, "p90": 1.1},
            "speedup": 2.0, "threads": 2, "runtime": "torch eager",
        },
        "kernels": {"qkit::linear[avx2]": 2},
        "verification": check,
        "remarks": ["a remark with <b>"],
        "calibration": {"samples": 64, "origin": "x.npz", "activations": [activation]},
        "details": {
            "histograms": [histogram],
            "times": [
                times | {"name": HOSTILE, "float_ms": 0.5, "quantized_ms": 0.25},
                times | {"name": "conv", "float_ms": None, "quantized_ms": 0.75, "roofline": None},
            ],
        },
        "training": {"history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]},
        "metrics": {"accuracy": {"float": 98.5, "quantized": 97.25}},
        "recipe": {"rules": [{"match": "```", "scheme": "w4a16-g32"}]},
        "source": {"path": "net.pt", "kind": "pickle",
                   "files": {"net.pt": {"bytes": 6112, "sha256": "ab" * 32}}},
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": {"cpu": "a processor", "isa": ["avx2"], "cores": 2, "memory_bytes": 8_000_000},
    }  # fmt: skip
    return Report("w4a16-g32", "w4a16-g32: weights", "torch", **fields | more)


def bench() -> BenchReport:
    """A baseline, one that is better, one that is beaten and one that failed; made up."""

    def contender(
        name: str, size: int, times: float, sqnr: float | None, verdict: str
    ) -> Contender:
        speed = None if verdict == "" else Speed(times, times * 0.9, times * 1.1, verdict)
        timings = tuple(
            Timing(batch, 2, 2.0 / times, 2.5, 1.9 / times, 2.1 / times, 40, 500 * times, speed)
            for batch in (1, 8)
        )
        error = Difference(sqnr, 0.999123, 0.125 if sqnr else 0.0, 0.985, 0.00123, 64, 1)
        return Contender(
            name, "qkit", f"/models/{name}", size, "w8a16", "torch", 12.5, 3.25, timings,
            300_000_000, 250_000_000, error, 98.25, {"qkit::linear[avx2]": 2},
        )  # fmt: skip

    return BenchReport(
        "net.pt",
        (
            contender("net.pt", 4_000_000, 1.0, None, ""),
            contender(HOSTILE, 1_000_000, 2.0, 31.25, "faster"),
            contender("beaten", 2_000_000, 1.02, 20.5, "not distinguishable"),
            Contender("broken.onnx", "onnx", "/models/broken.onnx", 10, failure="no graph"),
        ),
        Noise(True),
        (1, 8),
        (2,),
        {"origin": "x.npz", "samples": 64, "shapes": {"0": "float32 64x3"}},
        2,
        metric="mine:accuracy",
        command="qkit bench net.pt --report out.html",
        machine={"cpu": "a processor", "cores": 2, "system": "Linux"},
        versions={"torch": "2.13"},
    )
