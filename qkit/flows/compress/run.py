"""Following a recipe: each step gives a model that is measured, written and verified."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.errors import UsageError
from qkit.flows.compress.disk import LEDGER, Run
from qkit.flows.compress.given import Given, silent
from qkit.flows.compress.ledger import Ledger, Row, row_of
from qkit.flows.compress.recipe import Plan, read_recipe
from qkit.flows.compress.steps import STEPS
from qkit.flows.evaluate import AnyInputs, as_inputs, few, tensor_bytes
from qkit.flows.quantize import default_output
from qkit.flows.source import module_of, open_source, request_inputs
from qkit.flows.train import TrainData, open_train
from qkit.flows.train.check import check_classes, check_data
from qkit.flows.train.score import named, objective_of
from qkit.models import Loaded, infer
from qkit.packing.container import MAGIC
from qkit.targets import CODED
from qkit.targets.coded import SUFFIX
from qkit.targets.staging import check_destination, check_file_destination, write_whole

Told = Callable[[str], None]


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
    spelled = dict(recipe) if isinstance(recipe, Mapping) else None
    if spelled is not None:  # what is given needs no name
        spelled |= {"data": "given"} if data is not None else {}
        spelled |= {"calib": "given"} if calib is not None else {}
    plan = read_recipe(recipe if spelled is None else spelled)
    if STEPS[last := plan.steps[-1].name].run is None:
        raise UsageError(
            f"the step {last!r} writes a file, and here nothing is written",
            fix="qkit.flows.compress.compress_file, or qkit.flows.lower(model, ...)",
        )
    real = None if calib is None else as_inputs(calib)
    found = real or (infer(model) if inputs is None else as_inputs(inputs))
    judged: dict[str, Any] = {"seed": plan.seed, "loss": plan.loss, "metric": plan.metric}
    given = Given(few(found), real, data, val, **judged, teacher=model, told=told)
    check_training(plan, model, given)
    ledger = Ledger(plan.to_json(), [_row("float", model, given)])
    for step in plan.steps:
        told(f"{step.name}: {STEPS[step.name].summary}")
        start = time.perf_counter()
        model = step.follow(model, given)
        ledger.rows.append(_row(step.name, model, given, time.perf_counter() - start))
    return model, ledger


def _row(name: str, model: nn.Module, given: Given, seconds: float = 0.0) -> Row:
    return row_of(name, model, given, tensor_bytes(model.state_dict()), seconds)


def check_training(plan: Plan, model: nn.Module, given: Given) -> None:
    """Refuse data, and names in a step, that do not fit ``model`` before any step is paid for."""
    for step in plan.steps:
        STEPS[step.name].fits(model, step.options, given)
        if STEPS[step.name].renames:
            break
    if any(STEPS[step.name].labelled(step.options) for step in plan.steps):
        if given.data is None:
            raise UsageError("a step learns from labels, and no data are given", fix="data=")
        loss = named(plan.loss)
        check_data(model, given.data, objective_of(loss), loss)
        if given.val is not None:
            check_classes(given.data, given.val)


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
    given = _given(plan, request, loaded, told)
    check_training(plan, model, given)
    told(f"loaded {request.path}: {loaded.source.kind}")
    size = sum(facts["bytes"] for facts in loaded.source.files.values())
    ledger = Ledger(plan.to_json(), [row_of("float", model, given, size, 0.0)])
    if request.dry_run:
        return ledger
    with _work(request) as work:
        kept, trusted = request.work is not None, request.trust_pickle
        run = Run(plan, loaded, given, Path(work), ledger, kept, trusted, told)
        run.work.mkdir(parents=True, exist_ok=True)
        model = run.follow()
        ledger.verification = run.last(model, out, request.overwrite)
    ledger.artifact = str(out)
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


def _given(plan: Plan, request: CompressRequest, loaded: Loaded, told: Told) -> Given:
    folder = plan.calib is not None and Path(plan.calib).is_dir()
    images = plan.image if folder else ()
    found = request_inputs(_Asked(request.path, plan.input, plan.calib, images, plan.seed), loaded)
    data, val = (
        None if name is None else open_train(name, loaded.model, plan.image)
        for name in (plan.data, plan.val)
    )
    judged: dict[str, Any] = {"seed": plan.seed, "loss": plan.loss, "metric": plan.metric}
    real = found if plan.calib else None
    return Given(few(found), real, data, val, **judged, teacher=loaded.model, told=told)


def plan_lines(plan: Plan) -> list[str]:
    """What a recipe will do, in words: each step with the options that are set."""
    lines = []
    for number, step in enumerate(plan.steps, 1):
        set_ = {k: v for k, v in step.options.items() if v not in (None, [], False)}
        said = ", ".join(f"{name} {value}" for name, value in set_.items())
        lines.append(f"{number}. {step.name} ({STEPS[step.name].summary}): {said}")
    rest = {k: v for k, v in asdict(plan).items() if k != "steps" and v is not None}
    return [*lines, ", ".join(f"{name} {value}" for name, value in rest.items())]
