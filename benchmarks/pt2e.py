"""Models through PT2E to each runtime: does it work, how exact, how fast. Makes docs/pt2e.md.

    python benchmarks/pt2e.py [--model NAME] [--mode static|dynamic] [--target NAME] [--again]
    python benchmarks/pt2e.py --page

Each cell (model, mode, target) is a process of its own with a time limit, and one JSON line that is
appended to ``benchmarks/results/pt2e.jsonl`` when it is done: a run that was stopped goes on where
it was. ``--again`` measures anew what has a line, of which the last one counts. Times are of both
models in the target's runtime, interleaved, in a fresh process, on a batch of 4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cells import Cell, append, attempt, records
from tables import RESULTS, ROOT, markdown

RESULTS_FILE = RESULTS / "pt2e.jsonl"
PAGE = ROOT / "docs" / "pt2e.md"
MODES = {"static": "int8-static", "dynamic": "int8-dynamic"}
TARGETS = ("inductor", "xnnpack", "onnx")
# What a cell must keep of the float model's outputs. Of the trained MiniLM, whose activations have
# outliers, that is a cosine of 0.99, which is 17 dB: 1 - cosine is half of the noise power.
LEAST_DB = {"static": 10.0, "dynamic": 30.0}
LEAST_OF = {"MiniLM": 17.0}
# Models that by random weights amplify every rounding from layer to layer (by pi / (pi - 1) behind
# each batch-norm and relu: Yang et al. 2019, arXiv 1902.08129): they must keep that, or at least
# what ONNX Runtime's own quantization of the same model and data keeps.
CHAOTIC = ("MobileNetV2", "MobileNetV3", "EfficientNet-B0")
# Batches that the artifact must take besides the one it was made with.
BATCHES = (1, 3)
# The share of the processors that others may take while a cell is timed.
MOST_LOAD = 0.1
# How the status of a cell begins that qkit refuses on purpose: nothing there has an integer kernel.
REFUSED = "refused: "
NOTHING = "CoverageError: nothing was quantized"


def measure(model: str, mode: str, target: str) -> Cell:
    """The cell, in this process."""
    import torch
    from accuracy import onnxruntime_static
    from pt2e_models import MODELS

    from qkit.flows import lower
    from qkit.graph import capture
    from qkit.models import Inputs, leading, run, split
    from qkit.report import compare
    from qkit.targets.backend import backend

    family = MODELS[model]
    net, given = family.model(), Inputs((), family.inputs(), model)
    with tempfile.TemporaryDirectory(prefix="qkit-pt2e-") as folder:
        out = Path(folder, "out")
        report = lower(net, MODES[mode], out, target=target, calib=given.kwargs)
        runtime = backend(target)
        session, held = runtime.load(out / runtime.file, torch.get_num_threads()), []
        parts = [split(given, size) for size in BATCHES]
        for part in parts:
            try:
                got = session((), part.kwargs)
            except Exception as error:
                held.append(f"{leading(part)}: {type(error).__name__}")
                continue
            held.append(round(compare(run(net, part), got).sqnr_db or 0.0, 1))
    rival = {}
    if mode == "static" and family.name in CHAOTIC:
        # What ONNX Runtime itself makes of the model and the data.
        with torch.no_grad():
            (x,) = given.kwargs.values()
            theirs = onnxruntime_static(capture(net, (), given.kwargs), x)
            found = [compare(run(net, p), theirs((), p.kwargs)).sqnr_db for p in (given, *parts)]
        rival = {"rival_db": round(min(db or 0.0 for db in found), 1)}
    return rival | {
        "ran": report.coverage["integer_layers"],
        "expected": report.coverage["integer_layers_expected"],
        "layers": [report.coverage["layers_quantized"], report.coverage["layers_left"]],
        "sqnr_db": report.error["sqnr_db"],
        "speedup": report.latency_ms["speedup"],
        "ms": [report.latency_ms[name]["median"] for name in ("float", "quantized")],
        "size_ratio": round(report.size_bytes["artifact"] / report.size_bytes["float"], 4),
        "bytes": report.size_bytes["artifact"],
        "batches": held,
        "kernels": report.kernels,
        "remarks": report.remarks,
        "versions": report.versions,
        "machine": report.machine,
    }


def judged(cell: Cell) -> str:
    """``passed``, or what is wrong with a cell that was measured."""
    if cell["ran"] < cell["expected"]:
        return f"{cell['ran']} of {cell['expected']} layers run as integers"
    if wrong := [each for each in cell["batches"] if isinstance(each, str)]:
        return f"another batch fails ({', '.join(wrong)})"
    found = min([cell["sqnr_db"], *cell["batches"]])
    least = LEAST_OF.get(cell["model"], LEAST_DB[cell["mode"]])
    rival = cell.get("rival_db")
    if found < least and (rival is None or found < rival):
        other = "" if rival is None else f" and than the {rival:.1f} of ONNX Runtime's own"
        return f"{found:.1f} dB, less than {least:g}{other}"
    return "passed"


def status_of(record: Cell) -> str:
    """What became of a cell: judged, refused on purpose, or failed."""
    if "ran" in record:
        return judged(record)
    status = str(record["status"])
    return REFUSED * status.startswith(NOTHING) + status


def only(model: str, mode: str, target: str) -> None:
    """What the process of a cell does: its JSON on standard output, or its error as one line."""
    from qkit.errors import QkitError

    try:
        cell = measure(model, mode, target)
    except QkitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(cell))


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """What is asked for."""
    from pt2e_models import MODELS

    for model in MODELS:
        for mode in MODES:
            for target in TARGETS:
                asked = (given.model, model), (given.mode, mode), (given.target, target)
                if all(want in (None, name) for want, name in asked):
                    yield model, mode, target


HEAD = """# Models through PT2E, by target

Made by `python benchmarks/pt2e.py --page` from `benchmarks/results/pt2e.jsonl`, which
`python benchmarks/pt2e.py` writes: each cell quantizes a model of the size that is deployed
(`benchmarks/pt2e_models.py`; random weights with batch-norm statistics of the inputs, but for
MiniLM), lets a fresh process verify and time the artifact in its runtime, and runs it on batches of
1 and 3 besides the 4 it was made with. {machine}

A cell is **integer layers that run / expected, SQNR to the float model, speed over the float model
in the same runtime, size beside the float model's file there**. It is *passed* where all layers
that should run as integers do, all batches work, and at least {least} are kept, or what ONNX
Runtime's own static quantization of the same model and data keeps (measured for {rivals}, which
with random weights amplify every rounding from layer to layer). Under
`dynamic` only linear layers (and, for ONNX Runtime, LSTMs) are integer: no runtime here has a
convolution that is right and faster with ranges taken at each call; a model without any linear
layer is therefore *refused*, with `int8-static` as the alternative. Tables of embeddings are int8
in both, and no layers that run. A speed is left out where other
processes took more than {load:.0%} of the processors meanwhile, or it is not known what they took.
A number in brackets is a note.

{passed} of {count} cells passed, {refused} are refused on purpose.

"""


def page(measured: list[Cell]) -> str:
    """docs/pt2e.md."""
    found = {(r["model"], r["mode"], r["target"]): r for r in measured}
    columns = [(mode, target) for mode in MODES for target in TARGETS]
    notes: dict[str, int] = {}

    def text(record: Cell | None) -> str:
        if record is None:
            return "not measured"
        if record["status"] == "passed":
            return figures(record)
        status = record["status"].removeprefix(REFUSED)
        number = notes.setdefault(status, len(notes) + 1)
        shown = "refused" if status != record["status"] else "failed"
        return f"{figures(record) if 'ran' in record else shown} [{number}]"

    models = list(dict.fromkeys(model for model, _, _ in found))
    rows = [[m, *(text(found.get((m, *column))) for column in columns)] for m in models]
    head = ["model", *(f"{mode}, {target}" for mode, target in columns)]
    passed = sum(r["status"] == "passed" for r in found.values())
    least = " and ".join(f"{db:g} dB ({name})" for name, db in (LEAST_DB | LEAST_OF).items())
    refused = sum(r["status"].startswith(REFUSED) for r in found.values())
    top = HEAD.format(
        machine=machine_of(found),
        least=least,
        load=MOST_LOAD,
        rivals=", ".join(CHAOTIC),
        passed=passed,
        count=len(found),
        refused=refused,
    )
    told = "".join(f"\n{number}. {note}" for note, number in notes.items())
    return top + markdown(head, rows) + "\n" + (f"{told}\n" if told else "")


def figures(record: Cell) -> str:
    """The figures of a cell that was measured."""
    loaded = record.get("load_of_others", 1.0) > MOST_LOAD  # old lines do not tell
    speed = "not timed quietly" if loaded else f"{record['speedup']:.2f}x"
    return (
        f"{record['ran']}/{record['expected']}, {record['sqnr_db']:.1f} dB, "
        f"{speed}, {record['size_ratio']:.2f}"
    )


def machine_of(found: dict[tuple[str, str, str], Cell]) -> str:
    """The processors and versions of the records, in words."""
    measured = [r for r in found.values() if "machine" in r]
    cpus = {f"{r['machine']['cpu']}, {r['machine']['threads']} threads" for r in measured}
    names = ("torch", "torchao", "executorch", "onnxruntime")
    kinds = {", ".join(f"{n} {r['versions'][n]}" for n in names) for r in measured}
    return f"Measured on {'; '.join(sorted(cpus))}; {'; '.join(sorted(kinds))}." if measured else ""


def main() -> None:
    """Measure what is asked for and has no line yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="one model, as docs/pt2e.md calls it")
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--again", action="store_true", help="measure what has a line, too")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a cell")
    parser.add_argument("--results", type=Path, default=RESULTS_FILE, help="the file of lines")
    parser.add_argument("--page", action="store_true", help="write docs/pt2e.md")
    parser.add_argument("--cell", nargs=3, metavar=("MODEL", "MODE", "TARGET"))
    given = parser.parse_args()
    if given.cell:
        only(*given.cell)
    elif given.page:
        PAGE.write_text(page(records(given.results)))
    else:
        done = {(r["model"], r["mode"], r["target"]) for r in records(given.results)}
        for cell in cells(given):
            if cell in done and not given.again:
                continue
            record = dict(zip(("model", "mode", "target"), cell, strict=True))
            record |= attempt(__file__, ["--cell", *cell], given.limit)
            record["status"] = status_of(record)
            print(*cell, record["status"], figures(record) if "ran" in record else "", flush=True)
            append(given.results, record)


if __name__ == "__main__":
    main()
