"""A run of a recipe on disk: each step's model is written and verified, and a run goes on."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import InputError, QkitError
from qkit.flows.coded import save_coded
from qkit.flows.compress.given import Given
from qkit.flows.compress.kinds import Written
from qkit.flows.compress.ledger import Ledger, Row, row_of
from qkit.flows.compress.recipe import Plan, Step
from qkit.flows.compress.steps import STEPS
from qkit.flows.evaluate import blank_report
from qkit.flows.save import save
from qkit.models import Loaded
from qkit.report import Report
from qkit.report.text import as_text
from qkit.targets import CODED
from qkit.targets.artifact import Artifact, read_artifact, sha256
from qkit.targets.staging import write_whole
from qkit.targets.torch import load as load_artifact

LEDGER, DATA = "ledger.json", "data"


@dataclass
class Run:
    """A run on disk. In ``work`` is what an earlier one has left; where it is ``kept``, what trains
    keeps its checkpoints there too."""

    plan: Plan
    loaded: Loaded
    given: Given
    work: Path
    ledger: Ledger
    kept: bool
    trust_pickle: bool
    told: Callable[[str], None]
    hashes: dict[str, str] | None = None

    def follow(self) -> nn.Module:
        """The model before the last step, with what an earlier run has left in ``work``."""
        assert self.loaded.model is not None
        model, done = self._found()
        for count in range(done + 1, len(self.plan.steps)):
            started = time.perf_counter()
            model = self.step(count, model)
            artifact, _ = self.write(model, self._folder(count), count, overwrite=True)
            self.note(count, model, _files_bytes(artifact), started)
            facts = self.ledger.to_json() | {DATA: self._data()}
            write_whole(self.work / LEDGER, as_text(facts).encode())
            self._forget(count)
        return model

    def step(self, count: int, model: nn.Module) -> nn.Module:
        """The model after step ``count`` (from 1)."""
        return self._announced(count).follow(model, self._given(count))

    def _given(self, count: int) -> Given:
        """What step ``count`` has: in a folder that stays, trainings keep checkpoints."""
        if not self.kept:
            return self.given
        folder, numbers = self._scratch(count), itertools.count(1)
        return replace(self.given, scratch=lambda: folder / str(next(numbers)))

    def _scratch(self, count: int) -> Path:
        """The folder for the checkpoints of a step of this very recipe, source and data."""
        facts = [self.plan.first(count), self._source(), self._data()]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.work / f"{self._folder(count).name}-training-{digest[:12]}"

    def _forget(self, count: int) -> None:
        """Remove the checkpoints of a step that is done."""
        shutil.rmtree(self._scratch(count), ignore_errors=True)

    def _source(self) -> dict[str, Any]:
        """What the model was read from, as an artifact says it."""
        source = self.loaded.source
        return json.loads(json.dumps({"kind": source.kind, "files": source.files}))

    def _data(self) -> dict[str, str]:
        """The hashes of the data that are files."""
        if self.hashes is None:
            names = {str(n) for n in (self.plan.data, self.plan.val, self.plan.calib)}
            self.hashes = {n: sha256(Path(n)) for n in sorted(names) if Path(n).is_file()}
        return self.hashes

    def _announced(self, count: int) -> Step:
        step = self._step(count)
        self.told(f"{count}/{len(self.plan.steps)} {step.name}: {STEPS[step.name].summary}")
        return step

    def last(self, model: nn.Module, out: Path, overwrite: bool) -> dict[str, Any]:
        """Follow the last step, whose output is ``out``; return the verification."""
        started, count = time.perf_counter(), len(self.plan.steps)
        if (write := STEPS[self._step(count).name].write) is None:
            model = self.step(count, model)
            artifact, report = self.write(model, out, count, overwrite)
            self.note(count, model, _files_bytes(artifact), started)
            self._forget(count)
            return report.verification
        step, given = self._announced(count), self._given(count)
        written = write(model, step.options, given, out, self.loaded.source, overwrite)
        self.note(count, model, written.file.stat().st_size, started, written)
        self._forget(count)
        return written.report.verification

    def write(
        self, model: nn.Module, out: Path, count: int, overwrite: bool
    ) -> tuple[Artifact, Report]:
        """Write the model after ``count`` steps to ``out`` and verify it."""
        last = count == len(self.plan.steps)
        recipe = self.plan.to_json() if last else self.plan.first(count)
        name = " -> ".join(step.name for step in self.plan.steps[:count])
        report = blank_report(name, name, "torch", recipe, [])
        report.size_bytes["source"] = self.ledger.rows[0].bytes
        writer = save_coded if last and self.plan.format == CODED else save
        artifact = writer(
            model,
            out,
            report=report,
            inputs=self.given.inputs,
            source=self.loaded.source,
            builder=self.loaded.builder,
            trust_pickle=self.trust_pickle,
            overwrite=overwrite,
        )
        return artifact, report

    def note(
        self,
        count: int,
        model: nn.Module,
        size: int,
        started: float,
        written: Written | None = None,
    ) -> None:
        """Add the row of the step."""
        name, seconds = self._step(count).name, time.perf_counter() - started
        self.ledger.rows.append(row_of(name, model, self.given, size, seconds, written))

    def _step(self, count: int) -> Step:
        return self.plan.steps[count - 1]

    def _folder(self, count: int) -> Path:
        return self.work / f"{count:02d}-{self._step(count).name}"

    def _found(self) -> tuple[nn.Module, int]:
        """The model of the last step that is there for this very recipe, source and data, and its
        number.

        The last step of all is never there: it is the output.
        """
        assert self.loaded.model is not None
        try:
            facts = json.loads((self.work / LEDGER).read_text())
            rows = [Row(**row) for row in facts["rows"]] if facts[DATA] == self._data() else []
        except (OSError, ValueError, TypeError, KeyError):
            return self.loaded.model, 0
        for count in range(min(len(self.plan.steps), len(rows)) - 1, 0, -1):
            try:
                artifact = read_artifact(self._folder(count))
            except InputError:
                continue
            if (artifact.meta.get("recipe"), artifact.meta.get("source")) != (
                self.plan.first(count),
                self._source(),
            ):
                continue
            try:
                model = load_artifact(artifact.path, copy.deepcopy(self.loaded.model))
            except QkitError:
                continue
            self.ledger.rows += rows[1 : count + 1]
            self.told(f"going on behind step {count}, {self._step(count).name}")
            return model, count
        return self.loaded.model, 0


def _files_bytes(artifact: Artifact) -> int:
    """The bytes of the files that a deployment needs."""
    files = [artifact.path] if artifact.is_coded else artifact.weights
    return sum(path.stat().st_size for path in files)
