"""The fresh process of one contender: ``python -m qkit.flows.bench.worker``.

It is asked on standard input and answers on standard output, one line of JSON each. The first line
is the job (:func:`qkit.flows.bench.process.Running`); the others have ``do``:

``load``     opens the contender, calls it once on the inputs in ``file``
``batch``    takes the inputs in ``file`` for the calls to come, and warms up
``turn``     calls for ``seconds``, and gives the milliseconds of each call
``memory``   the largest resident memory so far
``outputs``  runs on the inputs in ``file``, ``batch`` samples in a call; writes them to ``out``
``metric``   calls the user's function ``function`` with what runs the contender, ``batch`` samples
             in a call
``kernels``  which implementations run

An answer is an object, or ``{"error": ...}``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import InputError, QkitError, first_line
from qkit.flows.bench.calling import in_batches
from qkit.flows.bench.opened import Opened, opened
from qkit.flows.check import inputs_in
from qkit.models import Inputs, batches, resolve_callable
from qkit.report import peak_rss_bytes, resident_bytes
from qkit.targets.weights import save_tensors

WARMUP = 3
# More calls in a turn say no more about it.
MAX_CALLS = 200
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Worker:
    """The contender of one job, as it is asked for."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self._opened: Opened | None = None
        self._inputs: Inputs | None = None

    @property
    def contender(self) -> Opened:
        """The contender, which was loaded."""
        assert self._opened is not None
        return self._opened

    @property
    def inputs(self) -> Inputs:
        """What it is called with."""
        assert self._inputs is not None
        return self._inputs

    def load(self, file: str) -> dict[str, Any]:
        """Open it and call it once."""
        inputs = inputs_in(Path(file))
        base = sum(resident_bytes().values()) or None
        start = time.perf_counter()
        self._opened = opened(self.job)
        loaded = time.perf_counter() - start
        self._inputs = self.contender.fit(inputs)
        start = time.perf_counter()
        self.contender.call(self._inputs)
        cold = time.perf_counter() - start
        return {
            "runtime": self.contender.runtime,
            "load_ms": loaded * 1e3,
            "cold_start_ms": cold * 1e3,
            "base_memory_bytes": base,
        }

    def batch(self, file: str) -> dict[str, Any]:
        """Other inputs."""
        self._inputs = self.contender.fit(inputs_in(Path(file)))
        for _ in range(WARMUP):
            self.contender.call(self.inputs)
        gc.collect()
        return {}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Call it; the first call, after a rest, is not timed."""
        call, inputs = self.contender.call, self.inputs
        times: list[float] = []
        gc.disable()
        try:
            call(inputs)
            end = time.perf_counter() + seconds
            while not times or (len(times) < MAX_CALLS and time.perf_counter() < end):
                start = time.perf_counter()
                results = call(inputs)
                times.append((time.perf_counter() - start) * 1e3)
                del results
        finally:
            gc.enable()
        return {"ms": times}

    def memory(self) -> dict[str, Any]:
        """The peak."""
        return {"peak_memory_bytes": peak_rss_bytes()}

    def outputs(self, file: str, batch: int, out: str) -> dict[str, Any]:
        """Run and write what comes out, as ``CALL.INDEX``."""
        found: dict[str, Tensor] = {}
        for call, given in enumerate(batches(inputs_in(Path(file)), batch)):
            results = self.contender.call(self.contender.fit(given))
            found |= {f"{call}.{index}": tensor for index, tensor in enumerate(results)}
        save_tensors(found, Path(out))
        return {}

    def metric(self, function: str, batch: int) -> dict[str, Any]:
        """What the user's function says of it."""

        def call(inputs: Inputs) -> list[Tensor]:
            return self.contender.call(self.contender.fit(inputs))

        def run(*args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
            results = in_batches(call, Inputs(args, kwargs, function), batch)
            return results[0] if len(results) == 1 else tuple(results)

        measured: Any = resolve_callable(function)
        value = float(measured(run))
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError("the metric is not finite", where=function, got=value)
        return {"metric": value}

    def kernels(self) -> dict[str, Any]:
        """What runs."""
        return {"kernels": dict(self.contender.kernels(self.inputs))}


def answer(worker: Worker, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, or what went wrong, in a line."""
    do: Callable[..., dict[str, Any]] = getattr(worker, asked.pop("do"))
    try:
        return do(**asked)
    except QkitError as error:
        return {"error": str(error)}
    except Exception as error:  # of the model, its runtime, or the user's function
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def _die_with_parent() -> None:
    """A process that rests is stopped; nobody would wake it if its parent was killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def main() -> int:
    """Answer until there is nothing more to read."""
    _die_with_parent()
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    worker = Worker(job)
    for line in sys.stdin:
        print(json.dumps(answer(worker, json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
