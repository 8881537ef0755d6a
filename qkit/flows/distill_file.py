"""``qkit distill``: from a teacher in a file, and data, to a verified student."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkit.distill import Match, keep_layers, layer_map
from qkit.errors import UsageError
from qkit.flows.compute import parameters
from qkit.flows.distill import Teaching, distill
from qkit.flows.evaluate import fill_cost, tensor_bytes
from qkit.flows.prune import prune
from qkit.flows.ptq import Progress, no_progress
from qkit.flows.quantize import default_output
from qkit.flows.save import save
from qkit.flows.source import module_of, open_source
from qkit.flows.train import TrainRequest, scores
from qkit.models import Inputs, Loaded
from qkit.report import machine, versions
from qkit.report.distill import DistillReport
from qkit.spec import steps_recipe
from qkit.targets.staging import check_destination

WEIGHT, TEMPERATURE, EPOCHS = 0.9, 4.0, 20
LAYERS = "layers"


@dataclass(frozen=True)
class DistillRequest:
    """One run of ``qkit distill``: the teacher in ``path``, and one way to a student: its own file
    (``student``), or the teacher with ``keep_layers`` layers or the share ``width`` of its
    parameters. The fields are the command's options."""

    path: str
    training: TrainRequest
    student: str | None = None
    student_model: str | None = None
    keep_layers: int | None = None
    width: float | None = None
    match: tuple[str, ...] = ()
    teacher_precision: str | None = None
    cache: bool = False
    model: str | None = None
    trust_pickle: bool = False
    output: str | None = None
    overwrite: bool = False


def distill_file(
    request: DistillRequest,
    *,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> DistillReport:
    """Load, derive, train, write, verify in a fresh process; return the report.

    Raises what :func:`~qkit.flows.distill.distill`, :func:`qkit.models.load` and :func:`qkit.save`
    raise; nothing is left at the output then, but the run's own folder goes on with ``resume``.
    """
    start = time.perf_counter()
    ways = (request.student, request.keep_layers, request.width)
    if sum(way is not None for way in ways) != 1:
        raise UsageError(
            "a student is given in one way",
            wanted="one of --student FILE, --keep-layers N and --width SHARE",
        )
    out = Path(request.output or default_output(request.path, "distilled"))
    check_destination(out, overwrite=request.overwrite)
    given = _opened(request, request.path, request.model)
    told(f"loaded {request.path}: {given.source.kind}")
    teacher = _module(given)
    training = request.training
    data, val = training.data(teacher)
    inputs = next(data.epoch(0, 0, training.options.batch_size, shuffle=False)).inputs
    student, made = _student(request, teacher, inputs)
    folder, scored = training.folder(out), dict[str, Any](training.scored)
    teaching = Teaching(
        WEIGHT if training.teacher is None else training.teacher,
        training.temperature,
        matches_of(request.match, student, teacher),
        request.teacher_precision,
        folder if request.cache else None,
    )
    done = distill(
        student,
        teacher,
        data,
        val=val,
        teaching=teaching,
        options=training.options,
        **scored,
        folder=folder,
        resume=training.resume,
        origin={"teacher": given.source.files, "student": _way(request)},
        progress=progress,
        told=told,
    )
    report = DistillReport(
        scheme="distilled",
        recipe=_recipe(request, teaching),
        training=done.to_json(),
        versions=versions(),
        machine=machine(),
    )
    models = {"teacher": teacher, "student": student}
    judged = data if val is None else val
    report.metrics = scores(models, judged, **scored)
    report.before, report.after = ({"params": parameters(each)} for each in models.values())
    report.size_bytes["source"] = tensor_bytes(teacher.state_dict())
    report.remarks += given.source.notes
    if val is None:
        report.remarks.append("the metrics are those of the training data: --val gives others")
    told(f"writing {out} and verifying it in a fresh process")
    save(
        student,
        out,
        report=report,
        inputs=inputs,
        source=None if made is None else made.source,
        builder=None if made is None else made.builder,
        trust_pickle=request.trust_pickle,
        overwrite=request.overwrite,
        start=start,
    )
    fill_cost(report, start)
    return report


def _opened(request: DistillRequest, path: str, factory: str | None) -> Loaded:
    return open_source(path, factory=factory, trust_pickle=request.trust_pickle)


def _module(loaded: Loaded) -> nn.Module:
    return module_of(loaded, "does not tell what is computed", "--model (or --student-model)")


def _student(
    request: DistillRequest, teacher: nn.Module, inputs: Inputs
) -> tuple[nn.Module, Loaded | None]:
    """The student, and the file that it is from; a derived one comes with its program."""
    if request.student is not None:
        made = _opened(request, request.student, request.student_model)
        return _module(made), made
    if request.keep_layers is not None:
        return keep_layers(teacher, request.keep_layers), None
    width = request.width
    if width is None or not 0 < width < 1:
        raise UsageError("a width is a share of the parameters, above 0 and below 1", got=width)
    return prune(teacher, inputs, amount=1 - width, unit="params", latency=False)[0], None


def _way(request: DistillRequest) -> dict[str, object]:
    """How the student came to be, as plain data."""
    ways = {"file": request.student, "keep_layers": request.keep_layers, "width": request.width}
    return {name: value for name, value in ways.items() if value is not None}


def _recipe(request: DistillRequest, teaching: Teaching) -> dict[str, Any]:
    """What was done, as a recipe: a student by its width is pruned first; one that keeps some
    layers, or comes from a file, is told as what no step makes."""
    training, steps = request.training, []
    rest = {n: v for n, v in training.options.to_json().items() if n not in ("seed", "trackers")}
    options: dict[str, Any] = {
        "teacher": teaching.weight,
        "temperature": teaching.temperature,
        "match": list(request.match),
        "teacher_precision": teaching.precision,
    }
    if request.width is not None:
        steps.append({"prune": {"amount": 1 - request.width, "unit": "params"}})
    else:
        options["student"] = _way(request)
    return steps_recipe(
        *steps,
        {"distill": options | rest},
        data=Path(training.train).name,
        val=training.val and Path(training.val).name,
        loss=training.loss,
        metric=training.metric,
        seed=training.options.seed,
    )


def matches_of(texts: Sequence[str], student: nn.Module, teacher: nn.Module) -> tuple[Match, ...]:
    """``layers`` or ``STUDENT=TEACHER``, each maybe with ``:attention`` behind it."""
    found: list[Match] = []
    for text in texts:
        pair, _, kind = text.partition(":")
        ours, equals, theirs = pair.partition("=")
        if pair == LAYERS:
            found += layer_map(student, teacher, kind or "features")
        elif equals and ours and theirs:
            found.append(Match(ours, theirs, kind or "features"))
        else:
            raise UsageError(
                "not a match of features",
                got=repr(text),
                wanted="layers or STUDENT=TEACHER, and :attention where that is meant",
            )
    return tuple(found)
