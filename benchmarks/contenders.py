"""One model as six contenders, by ``qkit bench``: its reports, and whether it says the same again.

    python benchmarks/contenders.py [--case digits] [--runs 11] [--tries 33] [--reports FOLDER]

The trained digits CNN and MiniLM (32 tokens) in float, twice, and as `w8a16`, `w4a16-g32` and int8
for Inductor, XNNPACK and ONNX Runtime: static for the CNN, with dynamic ranges for MiniLM. Each is
made by ``qkit quantize`` and runs on one thread: how long two threads wait for each other changes
on a virtual machine, probably with the cores that the host gives it (on two threads the CNN takes
0.16 ms, or 0.27 for seconds at a time, and 0.17 on one).

``qkit bench`` measures all of them until ``--runs`` were on an idle machine: one that the run calls
quiet and, as other guests of one host can slow a machine down for minutes, whose pace (a fixed
piece of work, before and after) is that of the first idle run within 5 %. A run waits for that
pace, two minutes at most, and ``--tries`` ends it all. A line is one contender in one run: whether
it was ``idle``, its median and interval in milliseconds (``ms``, ``ci``), ``within``, whether the
median lies in the interval that the first idle run stated, the ``speedup`` over float with what may
be said of it (``verdict``), bytes, error and metric.
``float again`` is the same file as ``float``: nothing but "not distinguishable" is right there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lines import say, tell_head
from torch import Tensor

from qkit.flows.demo import load_digits, prepare
from qkit.report.bench import BenchReport
from qkit.report.noise import pace
from qkit.targets.trial import fresh_command

HERE = Path(__file__).resolve().parent
FLOAT, AGAIN = "float", "float again"
TARGETS = ("inductor", "xnnpack", "onnx")
LENGTH = 32  # tokens
THREADS = 1
# How much the pace of an idle machine may differ from one run to another; seconds to wait for it;
# and how often it is taken, once a second, to know what it can be.
SAME_PACE, PATIENCE, PROBES = 0.05, 120, 10


@dataclass(frozen=True)
class Case:
    """A model that ``made`` writes below a folder, returning it and its inputs (.npz), and the
    scheme that the runtimes for integers are given."""

    name: str
    made: Callable[[Path], tuple[Path, Path]]
    int8: str
    metric: str


def digits(folder: Path) -> tuple[Path, Path]:
    """The CNN of ``qkit demo``."""
    model, data, _ = prepare(folder)
    return model, data


def minilm(folder: Path) -> tuple[Path, Path]:
    """The pretrained MiniLM, and sentences of the Zen of Python: text that every machine has."""
    from pt2e_models import minilm_folder

    inputs = sentences()
    file = folder / "sentences.npz"
    np.savez(file, **{name: value.numpy() for name, value in inputs.items()})
    return minilm_folder(), file


def sentences() -> dict[str, Tensor]:
    """Nineteen aphorisms, as tokens."""
    import contextlib
    import io

    from pt2e_models import minilm_folder
    from transformers import AutoTokenizer

    with contextlib.redirect_stdout(io.StringIO()) as said:
        import this  # noqa: F401 (importing it prints the text)
    lines = [line for line in said.getvalue().splitlines()[1:] if line]
    form = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    return dict(AutoTokenizer.from_pretrained(minilm_folder())(lines, return_tensors="pt", **form))


def accuracy(run: Callable[[Tensor], Tensor]) -> float:
    """Of the digits, in percent: a metric of ``qkit bench``."""
    data = load_digits()
    right = run(data.test_x).argmax(1) == data.test_y
    return round(100 * float(right.float().mean()), 3)


def embedding_cosine(run: Callable[..., Tensor | tuple[Tensor, ...]]) -> float:
    """Of sentences, to those of the float model, on average: a metric of ``qkit bench``."""
    from pt2e_models import minilm as pretrained

    inputs = sentences()
    mask = inputs["attention_mask"].unsqueeze(-1)

    def embedded(hidden: Tensor) -> Tensor:
        return (hidden * mask).sum(1) / mask.sum(1)

    found = run(**inputs)
    hidden = found if isinstance(found, Tensor) else found[0]
    with torch.no_grad():
        wanted = pretrained().eval()(**inputs).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(embedded(hidden), embedded(wanted), dim=1)
    return round(float(cosine.mean()), 5)


CASES = {
    case.name: case
    for case in (
        Case("digits", digits, "int8-static", "accuracy"),
        Case("MiniLM", minilm, "int8-dynamic", "embedding_cosine"),
    )
}


def prepared(case: Case, folder: Path) -> tuple[dict[str, Path], Path]:
    """The contenders by name, made below ``folder``, and the inputs."""
    model, inputs = case.made(folder)
    found = {FLOAT: model, AGAIN: model}
    for scheme in ("w8a16", "w4a16-g32"):
        found[scheme] = folder / scheme
        command("quantize", model, "--scheme", scheme, "--calib", inputs, "-o", found[scheme])
    for target in TARGETS:
        out = found[f"int8 {target}"] = folder / target
        chosen = ("--scheme", case.int8, "--target", target)
        command("quantize", model, *chosen, "--calib", inputs, "-o", out)
    return found, inputs


def measured(
    case: Case, contenders: dict[str, Path], inputs: Path, out: Path, *options: str
) -> BenchReport:
    """One run of ``qkit bench``, written to the folder ``out``."""
    named = [f"{name}={path}" for name, path in contenders.items()]
    metric = ("--metric", f"contenders:{case.metric}", "--trust-code")
    command("bench", *named, "--calib", inputs, *metric, "-o", out, *options)
    return BenchReport.from_json(json.loads((out / "bench.json").read_text()))


def command(*words: str | Path) -> None:
    """Run ``qkit`` from this folder, where the metrics are found; its errors are shown."""
    run = fresh_command("qkit", *map(str, words), "-q")
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, cwd=HERE)


def same(found: float, known: float) -> bool:
    """Whether two paces are one."""
    return abs(found / known - 1) <= SAME_PACE


def await_pace(known: float | None) -> None:
    """Return when the machine's pace is ``known`` (None: the best within some seconds), or when
    that took too long."""
    probes = []
    while known is None:
        time.sleep(1)
        probes.append(pace())
        known = min(probes) if len(probes) == PROBES else None
    until = time.monotonic() + PATIENCE
    while not same(pace(), known) and time.monotonic() < until:
        time.sleep(1)


def idle(report: BenchReport, known: float | None) -> bool:
    """Whether the machine had nothing else to do, and kept its pace, ``known`` if it is."""
    paces = report.noise.pace
    if not report.noise.quiet or paces is None:
        return False
    return all(same(each, known or min(paces)) for each in paces)


def runs(
    case: Case, contenders: dict[str, Path], inputs: Path, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[int, bool, BenchReport, BenchReport]]:
    """Each run by number, whether the machine was idle, its report, and that of the first one that
    it was (until then, its own)."""
    first: BenchReport | None = None
    done = 0
    for run in range(options.tries):
        known = min(first.noise.pace) if first and first.noise.pace else None
        if options.tries > 1:
            await_pace(known)
        given = [f"--seconds={options.seconds}"]
        if options.reports and not run:
            options.reports.mkdir(parents=True, exist_ok=True)
            given += ["--report", str(options.reports / f"{case.name}.html"), "--overwrite"]
        report = measured(case, contenders, inputs, folder / f"run-{run}", *given)
        good = idle(report, known)
        first = first or (report if good else None)
        yield run, good, report, first or report
        done += good
        if done == options.runs:
            return


def records(report: BenchReport, first: BenchReport) -> Iterator[dict[str, Any]]:
    """The lines of one run."""
    stated = {each.name: each.timings[0] for each in first.contenders if each.timings}
    for each in report.contenders:
        if each.failure is not None or not each.timings:
            yield {"contender": each.name, "failure": each.failure}
            continue
        timing, interval = each.timings[0], stated[each.name]
        record: dict[str, Any] = {
            "contender": each.name,
            "ms": timing.median,
            "ci": [timing.ci_low, timing.ci_high],
            "within": interval.ci_low <= timing.median <= interval.ci_high,
            "bytes": each.size_bytes,
            "metric": each.metric,
            "memory_bytes": each.peak_memory_bytes,
        }
        if timing.speed is not None:
            record |= {"speedup": timing.speed.ratio, "verdict": timing.speed.verdict}
        if each.error is not None and each.error.sqnr_db is not None:
            record["sqnr_db"] = each.error.sqnr_db
        yield record


def main() -> None:
    """Prepare and measure each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="one case [both]")
    parser.add_argument("--runs", type=int, default=11, help="on an idle machine [11]")
    parser.add_argument("--tries", type=int, help="runs in all, idle or not [3 times as many]")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender [1]")
    parser.add_argument("--reports", type=Path, help="keep CASE.html of the first run here")
    options = parser.parse_args()
    options.tries = options.tries or 3 * options.runs
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes that are started
    torch.set_num_threads(THREADS)
    tell_head()
    for name in options.case or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="qkit-contenders-") as text:
            folder = Path(text)
            contenders, inputs = prepared(case, folder)
            for run, good, report, first in runs(case, contenders, inputs, folder, options):
                for record in records(report, first):
                    say(case=name, run=run, idle=good, pace=report.noise.pace, **record)


if __name__ == "__main__":
    main()
