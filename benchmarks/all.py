"""All benchmarks by one command.

    python benchmarks/all.py [--only models,layers]
    python benchmarks/all.py --sample

The first one takes hours, writes ``benchmarks/results/NAME.jsonl`` for each script, and makes the
tables of the README and docs/pt2e.md of them. A file of results is replaced once its script has run
to the end and its lines are as they should be (:mod:`sane`); before that it is ``NAME.jsonl.new``.

``--sample`` is to see in two minutes that everything runs: small cases of each script (but of
``contenders.py``, which a test runs), and of ``benchmarks/suite.py`` (pytest-benchmark), whose file
is compared with itself. It is on one thread, so that a busy machine takes no longer, and keeps
nothing, unless ``--results`` names a folder. The exit code is 1 where a script fails or a line is
missing, never for speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sane import complaints
from tables import RESULTS, ROOT

OUT, SCRATCH = "{out}", "{scratch}"
STREAMED = ["--gb=12", "--shards=6", f"--folder={SCRATCH}"]
SMALL_LAYER = ["--shapes=65x160", "--rows=1,3", "--rotate-mib=1", "--seconds=0.01"]


@dataclass(frozen=True)
class Plan:
    """The arguments of a script's runs, whose lines make one file: of all cases, and of a few (none
    if a test runs the script instead).

    A script prints its lines, or writes them to ``{out}`` itself; ``{scratch}`` is a new folder.
    """

    full: tuple[list[str], ...]
    sample: tuple[list[str], ...]


PLANS = {
    "numerics": Plan(([],), (["--quick"],)),
    "kernels": Plan(
        (["--quick", "--only=layers"], ["--only=latency,models"]),
        (["--quick", *SMALL_LAYER, "--only=layers,latency"],),
    ),
    "layers": Plan(
        ([],), (["--only=digits", "--seconds=0.05"], ["--only=minilm", "--seconds=0.05"])
    ),
    "models": Plan(([],), (["--quick"],)),
    "accuracy": Plan(([f"--results={OUT}"],), ([f"--results={OUT}", "--models", "MLP"],)),
    "compression": Plan(
        ([],), (["--quick", "--seeds=1", "--case=lenet-300-100", "--case=distill"],)
    ),
    # It takes two minutes by itself: tests/report/test_report_contenders.py runs it.
    "contenders": Plan(([],), ()),
    "pruning": Plan(
        ([f"--results={OUT}"],),
        ([f"--results={OUT}", "--quick", "--seconds=0.02", "--model=LSTM"],),
    ),
    "streaming": Plan(
        tuple(
            [*STREAMED, f"--kind={kind}", f"--workers={workers}"]
            for kind in ("safetensors", "pt")
            for workers in (1, 2)
        ),
        (["--gb=0.02", "--shards=2", f"--folder={SCRATCH}"],),
    ),
    "pt2e": Plan(
        ([f"--results={OUT}"],),
        ([f"--results={OUT}", "--model=MLP", "--mode=dynamic", "--target=onnx"],),
    ),
}


def run(name: str, arguments: list[str], out: Path) -> str | None:
    """One run of a script, its lines added to ``out``; the reason if it failed."""
    with tempfile.TemporaryDirectory(prefix="qkit-benchmark-") as folder:
        places = {OUT: str(out), SCRATCH: str(Path(folder, "scratch"))}
        given = [arguments_with(argument, places) for argument in arguments]
        with out.open("a") as lines, Path(folder, "errors").open("w+") as errors:
            script = str(ROOT / "benchmarks" / f"{name}.py")
            writes = any(OUT in argument for argument in arguments)
            done = subprocess.run(
                [sys.executable, "-W", "ignore", script, *given],
                stdout=subprocess.DEVNULL if writes else lines,
                stderr=errors,
                cwd=ROOT,
            )
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
    return f"exit {done.returncode}: {last}" if done.returncode else None


def arguments_with(argument: str, places: dict[str, str]) -> str:
    """``argument`` with the names of places filled in."""
    for name, path in places.items():
        argument = argument.replace(name, path)
    return argument


def measure(name: str, runs: tuple[list[str], ...], folder: Path) -> list[str]:
    """The file of results of one script; what is wrong with it."""
    new = folder / f"{name}.jsonl.new"
    new.unlink(missing_ok=True)
    for arguments in runs:
        if failed := run(name, arguments, new):
            return [failed]
    if not (wrong := complaints(name, new.read_text())):
        os.replace(new, folder / f"{name}.jsonl")
    return wrong


def suite(folder: Path) -> list[str]:
    """A short run of ``benchmarks/suite.py``; what is wrong with it."""
    out = folder / "suite.json"
    limits = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=5", "--benchmark-disable-gc"]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/suite.py", *limits]
    safe = os.environ | {"PYTHONSAFEPATH": "1"}  # the folders of the repository are no packages
    done = subprocess.run(
        [*command, f"--benchmark-json={out}"], capture_output=True, text=True, cwd=ROOT, env=safe
    )
    if done.returncode:
        return [f"exit {done.returncode}: {(done.stdout.strip().splitlines() or [''])[-1]}"]
    same = [sys.executable, "-m", "qkit", "bench", "compare", str(out), str(out)]
    done = subprocess.run(same, capture_output=True, text=True, env=safe)
    return [f"a run differs from itself: {done.stderr.strip()}"] if done.returncode else []


def chosen(only: str | None, *, sample: bool) -> Iterator[str]:
    """The names that are asked for, in the order in which they run."""
    known = [name for name, plan in PLANS.items() if plan.sample or not sample]
    known += ["suite"] if sample else []
    wanted = only.split(",") if only else known
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)} (there are: {', '.join(known)})")
    yield from (name for name in known if name in wanted)


def main() -> int:
    """Run what is asked for, one line each; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", action="store_true", help="two minutes: does everything run?")
    parser.add_argument("--only", help="scripts, separated by commas")
    parser.add_argument("--results", type=Path, help="the folder of the results")
    given = parser.parse_args()
    bad, begin = 0, time.perf_counter()
    if given.sample:
        os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="qkit-results-") as temporary:
        folder = given.results or (Path(temporary) if given.sample else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen(given.only, sample=given.sample):
            start = time.perf_counter()
            if name == "suite":
                wrong = suite(folder.resolve())
            else:
                plan = PLANS[name]
                wrong = measure(name, plan.sample if given.sample else plan.full, folder.resolve())
            bad += bool(wrong)
            print(f"{name:12} {time.perf_counter() - start:6.1f} s  {'; '.join(wrong) or 'fine'}")
            sys.stdout.flush()
    print(f"{'all':12} {time.perf_counter() - begin:6.1f} s")
    if folder == RESULTS:
        for command in (["tables.py"], ["pt2e.py", "--page"]):
            subprocess.run([sys.executable, *command], cwd=ROOT / "benchmarks", check=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
