"""Timing living processes in turns, and what is gathered of each contender."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from qkit.flows.bench.plan import Plan
from qkit.flows.bench.process import ContenderError, Running
from qkit.report.bench import place
from qkit.report.statistics import MIN_ROUNDS

# How long a contender is called in its turn: longer than the scheduler's slices, and short enough
# for many turns, as what disturbs lasts for seconds.
TURN_SECONDS = 0.02
MAX_ROUNDS = 1000
# A batch, and a number of threads.
Place = tuple[int, int]


@dataclass
class Cell:
    """One contender at one place: ``rounds`` of each start (the median call of each), and all
    ``calls``, in milliseconds."""

    rounds: dict[int, list[float]] = field(default_factory=dict)
    calls: list[float] = field(default_factory=list)


@dataclass
class Findings:
    """What is known of one contender; ``facts`` are lists of what each of its processes told."""

    cells: dict[Place, Cell] = field(default_factory=dict)
    facts: dict[str, list[Any]] = field(default_factory=dict)
    outputs: Path | None = None
    metric: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failure: str | None = None

    def note(self, answer: Mapping[str, Any] | None) -> None:
        """Add what a process told."""
        for key, value in (answer or {}).items():
            if value is not None:
                self.facts.setdefault(key, []).append(value)


@dataclass(frozen=True)
class Setting:
    """How it is measured: ``files`` of the inputs by batch, and that of the samples that outputs
    are ``compared`` on; ``seconds`` for each contender and place, or ``repeats`` rounds, over
    ``starts`` processes one after the other; ``job`` is what all jobs have in common."""

    files: Mapping[int, Path]
    compared: Path
    threads: Sequence[int]
    starts: int
    seconds: float
    repeats: int | None
    metric: str | None
    job: Mapping[str, Any]
    folder: Path
    told: Callable[[str], None]


class Campaign:
    """All that is measured of ``plans``; ``found`` is what came of it, by name."""

    def __init__(self, plans: Sequence[Plan], setting: Setting) -> None:
        self.plans = plans
        self.setting = setting
        self.found = {plan.name: Findings() for plan in plans}
        self._living: dict[str, Running] = {}
        # So many rounds has each start: those that the first one had time for.
        self._rounds: dict[Place, int] = {}

    def run(self) -> dict[str, Findings]:
        """Measure, and return what was found."""
        for threads in self.setting.threads:
            for start in range(self.setting.starts):
                with ExitStack() as stack:
                    self._start(threads, stack)
                    for batch in self.setting.files:
                        self._time((batch, threads), start)
                    for name in list(self._living):
                        self.found[name].note(self._ask(name, "memory", "the end"))
                    if (threads, start) == (self.setting.threads[0], 0):
                        for name in list(self._living):
                            self._look(name)
        return self.found

    def _start(self, threads: int, stack: ExitStack) -> None:
        """A process of each contender that can be loaded, started one after the other."""
        self._living = {}
        first = str(next(iter(self.setting.files.values())))
        for plan in self.plans:
            own = self.found[plan.name]
            if own.failure is not None and not own.cells:
                continue  # it could not be loaded, or not be called, before
            self.setting.told(f"starting {plan.name}, {threads} thread{'s' * (threads != 1)}")
            facts = {"kind": plan.kind, "file": str(plan.file), "trusted": plan.trusted}
            process = Running({**self.setting.job, **facts, "threads": threads})
            stack.enter_context(closing(process))
            self._living[plan.name] = process
            answer = self._ask(plan.name, "load", "loading", file=first)
            own.note(answer)
            if answer is None:
                self._living.pop(plan.name, None)

    def _ask(self, name: str, do: str, where: str, **given: Any) -> dict[str, Any] | None:
        """The answer of a contender; None if there is none, which is its failure at ``where``."""
        try:
            return self._living[name].ask(do, **given)
        except ContenderError as error:
            own = self.found[name]
            own.failure = own.failure or f"{where}: {error}"  # the first is what is told
            if not error.alive:
                del self._living[name]
            return None

    def _time(self, at: Place, start: int) -> None:
        """Rounds in which each contender has its turn; who is first changes from round to round."""
        where, file = place(*at), str(self.setting.files[at[0]])
        self.setting.told(f"timing {where}")
        racing = [
            name
            for name in list(self._living)
            if self._ask(name, "batch", where, file=file) is not None
        ]
        for name in racing:
            self.found[name].cells.setdefault(at, Cell()).rounds[start] = []
        begun, done = time.perf_counter(), 0
        while racing and not self._enough(at, done, time.perf_counter() - begun, len(racing)):
            turn = done % len(racing)
            for name in [*racing[turn:], *racing[:turn]]:
                cell = self.found[name].cells[at]
                answer = self._ask(name, "turn", where, seconds=TURN_SECONDS)
                if answer is None:  # rounds without it are no pairs: this start does not count
                    racing.remove(name)
                    del cell.rounds[start]
                    continue
                cell.rounds[start].append(median(answer["ms"]))
                cell.calls += answer["ms"]
            done += 1
        if done:
            self._rounds.setdefault(at, done)

    def _enough(self, at: Place, done: int, seconds: float, racing: int) -> bool:
        """Whether there are as many rounds as in the first start, or as there was time for."""
        setting = self.setting
        if at in self._rounds:
            return done >= self._rounds[at]
        least = math.ceil(max(MIN_ROUNDS, setting.repeats or 0) / setting.starts)
        if setting.repeats is not None or done < least:
            return done >= least
        return done >= MAX_ROUNDS or seconds >= setting.seconds / setting.starts * racing

    def _look(self, name: str) -> None:
        """What is asked once, when nothing is timed any more: outputs, metric, kernels."""
        own, setting = self.found[name], self.setting
        out = setting.folder / f"outputs-{list(self.found).index(name)}"
        given: dict[str, Any]
        given = {"file": str(setting.compared), "batch": next(iter(setting.files)), "out": str(out)}
        if self._ask(name, "outputs", "comparing", **given) is not None:
            own.outputs = out
        if setting.metric is not None and name in self._living:
            given = {"function": setting.metric, "batch": max(setting.files)}
            answer = self._ask(name, "metric", "the metric", **given)
            own.metric = None if answer is None else answer["metric"]
        if name in self._living:
            try:
                own.kernels = self._living[name].ask("kernels")["kernels"]
            except ContenderError as error:
                own.remarks.append(f"its kernels are not known: {error}")
