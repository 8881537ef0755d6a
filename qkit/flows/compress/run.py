"""Following a recipe: each step gives a model that is measured, written and verified."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import InputError, QkitError, UsageError
from qkit.flows.coded import save_coded
from qkit.flows.compress.ledger import Ledger, Row, row_of
from qkit.flows.compress.recipe import Plan, Step, read_recipe
from qkit.flows.compress.steps import STEPS, Given
from qkit.flows.evaluate import AnyInputs, as_inputs, blank_report, few, tensor_bytes
from qkit.flows.quantize import default_output
from qkit.flows.save import save
from qkit.flows.source import module_of, open_source, request_inputs
from qkit.flows.train import TrainData, open_train
from qkit.flows.train.check import check_data
from qkit.flows.train.score import objective_of
from qkit.models import Loaded, infer
from qkit.packing.container import MAGIC
from qkit.report import Report
from qkit.targets import CODED
from qkit.targets.artifact import Artifact, read_artifact
from qkit.targets.coded import SUFFIX
from qkit.targets.staging import check_destination, check_file_destination, write_whole
from qkit.targets.torch import load as load_artifact

LEDGER = "ledger.json"
Told = Callable[[str], None]


def silent(text: str) -> None:
    """Say nothing."""


def compress(
    model: nn.Module,
    recipe: Mapping[str, Any] | str | Path,
    *,
    inputs: AnyInputs | None = None,
    calib: AnyInputs | None = None,
    data: TrainData | None = None,
    val: TrainData | None = None,
    told: Told = silent,
) -> tuple[nn.Module, Ledger]:
    """``model`` after all steps of ``recipe`` (a mapping, or a file), and the ledger.

    ``inputs`` are what it is traced, timed and compared on (``calib`` the same, but real, to learn
    from), ``data`` and ``val`` labelled data; given here, they need no names in the recipe. Nothing
    is written, and ``bytes`` are those of the tensors. ``model`` is not changed. Raises what
    :func:`read_recipe` and the steps raise.
    """
    named = dict(recipe) if isinstance(recipe, Mapping) else None
    if named is not None:  # what is given needs no name
        named |= {"data": "given"} if data is not None else {}
        named |= {"calib": "given"} if calib is not None else {}
    plan = read_recipe(recipe if named is None else named)
    real = None if calib is None else as_inputs(calib)
    found = real or (infer(model) if inputs is None else as_inputs(inputs))
    given = Given(few(found), real, data, val, plan.seed)
    check_training(plan, model, given)
    ledger = Ledger(plan.to_json(), [_row("float", model, given)])
    for step in plan.steps:
        told(f"{step.name}: {STEPS[step.name].summary}")
        start = time.perf_counter()
        model = STEPS[step.name].run(model, step.options, given).eval()
        ledger.rows.append(_row(step.name, model, given, time.perf_counter() - start))
    return model, ledger


def _row(name: str, model: nn.Module, given: Given, seconds: float = 0.0) -> Row:
    return row_of(name, model, given, tensor_bytes(model.state_dict()), seconds)


def check_training(plan: Plan, model: nn.Module, given: Given) -> None:
    """Refuse data that do not fit ``model`` before any step is paid for."""
    if not any(STEPS[step.name].trains(step.options) for step in plan.steps):
        return
    if given.data is None:
        raise UsageError("a step trains, and no data are given", fix="data=")
    check_data(model, given.data, objective_of("cross-entropy"), "cross-entropy")


@dataclass(frozen=True)
class CompressRequest:
    """One run of ``qkit compress`` on a file; the fields are the command's options.

    ``work`` is a folder where the model after each step stays, and from which a run goes on.
    """

    recipe: str
    path: str
    output: str | None = None
    work: str | None = None
    model: str | None = None
    trust_pickle: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class _Asked:
    """What the recipe says of inputs, as the flows ask for it."""

    path: str
    input: str | None
    calib: str | None
    image: tuple[str, ...]
    seed: int


def compress_file(request: CompressRequest, *, told: Told = silent) -> Ledger:
    """Follow the recipe on the model in a file; write and verify the result; return the ledger.

    After each step the model is an artifact in ``request.work``, verified in a fresh process, and
    its row is in ``ledger.json`` there: a run that was stopped goes on behind the last of them.
    Nothing is left at the output if anything is refused or fails. The ledger is written beside
    (a coded file) or into (a folder) the output.
    """
    plan = read_recipe(request.recipe)
    out = _destination(request, plan)
    loaded = open_source(request.path, factory=request.model, trust_pickle=request.trust_pickle)
    model = module_of(loaded, "does not tell what is computed")
    given = _given(plan, request, loaded)
    check_training(plan, model, given)
    told(f"loaded {request.path}: {loaded.source.kind}")
    size = sum(facts["bytes"] for facts in loaded.source.files.values())
    ledger = Ledger(plan.to_json(), [row_of("float", model, given, size, 0.0)])
    if request.dry_run:
        return ledger
    with _work(request) as work:
        run = _Run(plan, loaded, given, Path(work), ledger, request.trust_pickle, told)
        run.work.mkdir(parents=True, exist_ok=True)
        model = run.follow()
        started = time.perf_counter()
        model = run.step(len(plan.steps), model)
        artifact, report = run.write(model, out, len(plan.steps), request.overwrite)
        run.note(len(plan.steps), model, artifact, started)
    ledger.verification, ledger.artifact = report.verification, str(out)
    beside = out / LEDGER if out.is_dir() else out.with_suffix(f".{LEDGER}")
    write_whole(beside, ledger.dumps().encode())
    return ledger


def _work(request: CompressRequest) -> AbstractContextManager[str]:
    """The folder of the steps: the user's, or one that is removed."""
    if request.work is not None:
        return nullcontext(request.work)
    return tempfile.TemporaryDirectory(prefix="qkit-compress-")


def _destination(request: CompressRequest, plan: Plan) -> Path:
    out = Path(request.output or default_output(request.path, "compressed"))
    if plan.format != CODED:
        check_destination(out, overwrite=request.overwrite)
        return out
    out = out if request.output else out.with_name(out.name + SUFFIX)
    check_file_destination(out, MAGIC, overwrite=request.overwrite)
    return out


def _given(plan: Plan, request: CompressRequest, loaded: Loaded) -> Given:
    asked = _Asked(request.path, plan.input, plan.calib, (), plan.seed)
    found = request_inputs(asked, loaded)
    data, val = (None if n is None else open_train(n, loaded.model) for n in (plan.data, plan.val))
    return Given(few(found), found if plan.calib else None, data, val, plan.seed)


@dataclass
class _Run:
    """A run on disk."""

    plan: Plan
    loaded: Loaded
    given: Given
    work: Path
    ledger: Ledger
    trust_pickle: bool
    told: Told

    def follow(self) -> nn.Module:
        """The model before the last step, with what an earlier run has left in ``work``."""
        assert self.loaded.model is not None
        model, done = self._found()
        for count in range(done + 1, len(self.plan.steps)):
            started = time.perf_counter()
            model = self.step(count, model)
            artifact, _ = self.write(model, self._folder(count), count, overwrite=True)
            self.note(count, model, artifact, started)
            write_whole(self.work / LEDGER, self.ledger.dumps().encode())
        return model

    def step(self, count: int, model: nn.Module) -> nn.Module:
        """The model after step ``count`` (from 1)."""
        step = self._step(count)
        self.told(f"{count}/{len(self.plan.steps)} {step.name}: {STEPS[step.name].summary}")
        return STEPS[step.name].run(model, step.options, self.given).eval()

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

    def note(self, count: int, model: nn.Module, artifact: Artifact, started: float) -> None:
        """Add the row of the step."""
        files = [artifact.path] if artifact.is_coded else artifact.weights
        size = sum(path.stat().st_size for path in files)
        seconds = time.perf_counter() - started
        self.ledger.rows.append(row_of(self._step(count).name, model, self.given, size, seconds))

    def _step(self, count: int) -> Step:
        return self.plan.steps[count - 1]

    def _folder(self, count: int) -> Path:
        return self.work / f"{count:02d}-{self._step(count).name}"

    def _found(self) -> tuple[nn.Module, int]:
        """The model of the last step that is there for this very recipe and source, and its number.

        The last step of all is never there: it is the output.
        """
        assert self.loaded.model is not None
        try:
            rows = [Row(**row) for row in json.loads((self.work / LEDGER).read_text())["rows"]]
        except (OSError, ValueError, TypeError, KeyError):
            return self.loaded.model, 0
        for count in range(min(len(self.plan.steps), len(rows)) - 1, 0, -1):
            try:
                artifact = read_artifact(self._folder(count))
            except InputError:
                continue
            source = {"kind": self.loaded.source.kind, "files": self.loaded.source.files}
            if (artifact.meta.get("recipe"), artifact.meta.get("source")) != (
                self.plan.first(count),
                json.loads(json.dumps(source)),
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


def plan_lines(plan: Plan) -> list[str]:
    """What a recipe will do, in words: each step with the options that are set."""
    lines = []
    for number, step in enumerate(plan.steps, 1):
        set_ = {k: v for k, v in step.options.items() if v not in (None, [], False)}
        said = ", ".join(f"{name} {value}" for name, value in set_.items())
        lines.append(f"{number}. {step.name} ({STEPS[step.name].summary}): {said}")
    rest = {k: v for k, v in asdict(plan).items() if k != "steps" and v is not None}
    return [*lines, ", ".join(f"{name} {value}" for name, value in rest.items())]
