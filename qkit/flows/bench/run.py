"""``qkit bench``: contenders in fresh processes of their own, timed in turns, and compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qkit.errors import UsageError
from qkit.flows.bench.campaign import Campaign, Findings, Setting
from qkit.flows.bench.feed import known_inputs, samples
from qkit.flows.bench.plan import MODEL, Models, baseline_of, plans
from qkit.flows.bench.results import baseline_series, contenders
from qkit.flows.check import input_tensors
from qkit.flows.data import Data, tensors_of
from qkit.flows.evaluate import COMPARED_SAMPLES, AnyInputs
from qkit.models import Inputs, leading
from qkit.report import machine, versions
from qkit.report.bench import BenchReport
from qkit.report.noise import judge, pace, pulse
from qkit.report.statistics import MIN_ROUNDS
from qkit.targets.weights import save_tensors


def bench(
    models: Models,
    inputs: AnyInputs | Data | None = None,
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    seconds: float = 2.0,
    repeats: int | None = None,
    starts: int = 2,
    model: str | None = None,
    trust_pickle: bool = False,
    trust_code: bool = False,
    runtime_cache: bool = False,
    told: Callable[[str], None] = lambda text: None,
    command: str | None = None,
) -> BenchReport:
    """Measure ``models`` side by side on the same ``inputs``.

    Each of them, a list or by name, is a module, a file that :func:`qkit.models.load` reads, an
    artifact of any target, a file of another runtime (.onnx, .pte, .pt2), or a folder of
    optimum-quanto or compressed-tensors; each is run by what would serve it, in a fresh process of
    its own. The processes are timed in turns, ``seconds`` for each pair of ``batches`` and
    ``threads`` (torch's own number, if none is given), or ``repeats`` rounds, over ``starts``
    processes one after the other. Ratios and errors refer to the ``baseline``, the first one if
    none is named. ``metric`` (``package.module:function``) is called in each process with a
    function that takes what the model takes, any number of samples, and gives its tensor (a tuple,
    if there are several), and returns a figure; it runs the largest of ``batches`` at a time.

    Inputs that are not given are those of the first contender that knows some. ``model``
    (``package.module:factory``) builds the architecture of what does not carry it; else it is that
    of the first float model. Native code (.pt2 of AOTInductor) is run with ``trust_code`` only.

    A contender that fails is a row with its ``failure``. Raises
    :class:`~qkit.errors.UsageError` and :class:`~qkit.errors.InputError` for what is wrong before
    anything is run.
    """
    _check(batches, threads, seconds, repeats, starts)
    began = time.perf_counter()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with TemporaryDirectory(prefix="qkit-bench-") as text:
        folder = Path(text)
        chosen = plans(models, folder, trust_code=trust_code)
        reference = baseline_of(chosen, baseline)
        given = known_inputs(inputs, chosen, max(batches), model, trust_pickle)
        compared = _compared(given, batches[0])
        files = {size: folder / f"batch-{size}" for size in batches}
        for size, file in files.items():
            save_tensors(input_tensors(samples(given, size)), file)
        save_tensors(input_tensors(compared), folder / "compared")
        source = next((plan for plan in chosen if plan.kind == MODEL), None)
        setting = Setting(
            files=files,
            compared=folder / "compared",
            threads=tuple(threads or (torch.get_num_threads(),)),
            starts=starts,
            seconds=seconds,
            repeats=repeats,
            metric=metric,
            job={
                "model": model,
                "source": None if source is None else str(source.file),
                "source_trusted": source is not None and source.trusted,
                "trust_pickle": trust_pickle,
                "runtime_cache": runtime_cache,
            },
            folder=folder,
            told=told,
        )
        before = replace(pulse(), pace=pace())
        found = Campaign(chosen, setting).run()
        after = replace(pulse(), pace=pace())
        rows = contenders(chosen, found, reference, leading(compared), batches[0])
    return BenchReport(
        baseline=reference,
        contenders=rows,
        noise=judge(before, after, baseline_series(found[reference])),
        batches=tuple(batches),
        threads=tuple(setting.threads),
        inputs=_described(given),
        starts=starts,
        metric=metric,
        remarks=_remarks(given, batches, found[reference], reference),
        command=command,
        date=date,
        seconds=round(time.perf_counter() - began, 1),
        versions=versions(),
        machine=machine(),
    )


def _check(
    batches: Sequence[int],
    threads: Sequence[int] | None,
    seconds: float,
    repeats: int | None,
    starts: int,
) -> None:
    for name, values in (("batch", batches), ("threads", threads or (1,)), ("starts", (starts,))):
        if not values or min(values) < 1 or len(set(values)) != len(values):
            raise UsageError(
                f"not possible: {name}", got=list(values), wanted="different numbers above 0"
            )
    if seconds <= 0 or (repeats is not None and repeats < MIN_ROUNDS):
        raise UsageError(
            "too little would be measured",
            got=f"{seconds} s" if repeats is None else f"{repeats} rounds",
            wanted=f"more than 0 s, or {MIN_ROUNDS} rounds",
        )


def _compared(given: Inputs, batch: int) -> Inputs:
    """The samples on which outputs are compared: whole batches, as a fixed batch may be all that
    a contender takes."""
    return samples(given, max(1, min(leading(given), COMPARED_SAMPLES) // batch) * batch)


def _described(given: Inputs) -> dict[str, Any]:
    shapes = {
        name: f"{str(tensor.dtype)[6:]} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in tensors_of(given).items()
    }
    return {"origin": given.origin, "samples": leading(given), "shapes": shapes}


def _remarks(
    given: Inputs, batches: Sequence[int], found: Findings, reference: str
) -> tuple[str, ...]:
    remarks = []
    if (largest := max(batches)) > leading(given):
        remarks.append(
            f"there are {leading(given)} samples: in batches of up to {largest} they are repeated"
        )
    if found.failure is not None:
        remarks.append(f"the baseline {reference} failed, so nothing can be held against it")
    return tuple(remarks)
