"""Distillation: a small model learns from a large one what it answers, not only what is right."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.distill import Match, Matched, hard_and_soft, soft_targets
from qkit.distill.losses import check_alike, check_temperature, check_weight
from qkit.distill.match import Taught, listening
from qkit.errors import UsageError
from qkit.flows.evaluate import eval_mode, for_dtype
from qkit.flows.ptq import Progress, no_progress
from qkit.flows.quantize import quantize
from qkit.flows.train import Batch, TrainData, Trained, TrainOptions, labelled, train
from qkit.flows.train.check import as_train_data, check_data
from qkit.flows.train.record import Told
from qkit.flows.train.score import Objective, Score, objective_of
from qkit.flows.train.tables import main_output
from qkit.models import Inputs, run
from qkit.targets.staging import as_output_error, staged_file
from qkit.targets.weights import named_tensors, read_tensors, save_tensors

CACHE = "teacher.safetensors"


@dataclass(frozen=True)
class Teaching:
    """How a teacher is listened to: its softened answers count ``weight`` (the targets the rest),
    at ``temperature``; ``matches`` are features in the middle. It computes in its own precision, in
    ``bf16``, or quantized by a scheme of weights (``w8a16``, ``w4a16-g32``). With ``cache`` its
    answers about data in memory are computed once, and stored in that folder."""

    weight: float = 0.9
    temperature: float = 4.0
    matches: tuple[Match, ...] = ()
    precision: str | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_temperature(self.temperature)
        if self.cache is not None and self.matches:
            raise UsageError("features are not cached, only answers", fix="no cache, or no matches")

    def to_json(self) -> dict[str, Any]:
        """What decides about the result, as plain data."""
        matches = [asdict(match) for match in self.matches]
        return {"weight": self.weight, "temperature": self.temperature, "matches": matches,
                "precision": self.precision}  # fmt: skip


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: TrainData | Any,
    *,
    val: TrainData | Any | None = None,
    teaching: Teaching | None = None,
    options: TrainOptions | None = None,
    loss: str | Score = "cross-entropy",
    metric: str | Score | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    origin: dict[str, Any] | None = None,
    progress: Progress = no_progress,
    told: Told = lambda text: None,
) -> Trained:
    """Train ``student`` in place with ``data`` and with what ``teacher`` answers to them.

    Batches without targets are learnt from the teacher alone. ``teacher`` is not changed; other
    arguments are those of :func:`qkit.flows.train.train`. Raises what that raises, and
    :class:`~qkit.errors.InputError` where teacher and student answer differently shaped things.
    """
    teaching, options = teaching or Teaching(), options or TrainOptions()
    data = as_train_data(data)
    first = next(data.epoch(0, 0, 2, shuffle=False)).part(slice(2))
    ours, theirs = _first_answers(student, teacher, first, teaching)
    if first.targets is not None:  # all of them, before the first step
        check_data(student, data, objective_of(loss), loss)
    lecturer = _lowered(teacher, teaching.precision)
    if teaching.cache is not None:
        data = _cached(lecturer, data, teaching, told)
    model: nn.Module = student
    if teaching.matches:
        torch.manual_seed(options.seed)
        model = Matched(student, teaching.matches, ours, theirs)
    objective = _Objective(lecturer, teaching, objective_of(loss), model)
    done = train(
        model,
        data,
        val=val,
        options=options,
        loss=loss,
        objective=objective,
        metric=metric,
        folder=folder,
        resume=resume,
        origin={"teaching": teaching.to_json()} | (origin or {}),
        progress=progress,
        told=told,
    )
    student.eval()
    return done


def _first_answers(
    student: nn.Module, teacher: nn.Module, batch: Batch, teaching: Teaching
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matched features of both on some samples, whose answers must be alike."""
    with (
        eval_mode(student, teacher),
        torch.no_grad(),
        listening(student, [match.student for match in teaching.matches]) as ours,
        listening(teacher, [match.teacher for match in teaching.matches]) as theirs,
    ):
        run(student, batch.inputs)  # with clear errors
        run(teacher, batch.inputs)
        answers = [
            main_output(model(*batch.inputs.args, **batch.inputs.kwargs))
            for model in (student, teacher)
        ]
    check_alike(*answers)
    return dict(ours), dict(theirs)


def _lowered(teacher: nn.Module, precision: str | None) -> nn.Module:
    """``teacher`` as it computes its lessons: a quantized copy; no gradients, no training."""
    if precision is None:
        return teacher
    return quantize(teacher, precision, latency=False)[0]


@dataclass
class _Objective:
    """The loss of a student's answer to a batch."""

    teacher: nn.Module
    teaching: Teaching
    hard: Objective
    model: nn.Module

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        answer, features = output if isinstance(output, Taught) else (output, None)
        ours, matches = main_output(answer), self.teaching.matches
        with listening(self.teacher, [m.teacher for m in matches if features]) as seen:
            theirs = batch.taught
            if theirs is None:
                theirs = _answer(self.teacher, batch.inputs, ours.device)
        mask = batch.inputs.kwargs.get("attention_mask") if ours.dim() == 3 else None
        soft = soft_targets(ours, theirs, self.teaching.temperature, mask)
        known = None if batch.targets is None else self.hard(answer, batch)
        total = hard_and_soft(known, soft, self.teaching.weight)
        if features is not None:
            assert isinstance(self.model, Matched)
            total = total + self.model.loss(features, seen)
        return total


@torch.no_grad()
def _answer(teacher: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    if next((p.device for p in teacher.parameters()), device) != device:
        teacher.to(device)
    given = for_dtype(inputs, teacher)
    with eval_mode(teacher):
        return main_output(teacher(*given.args, **given.kwargs)).float()


def _cached(teacher: nn.Module, data: TrainData, teaching: Teaching, told: Told) -> TrainData:
    """``data`` with the teacher's answers, of which those on disk are taken if they are its own."""
    if not data.in_memory or data.samples is None:
        raise UsageError(
            "a teacher's answers are cached for data in memory: of a stream, nothing tells which "
            "sample is which",
            got=data.origin,
            fix="an .npz file, or tensors",
        )
    assert teaching.cache is not None
    whole = next(data.epoch(0, 0, data.samples, shuffle=False))
    path, key = teaching.cache / CACHE, _fingerprint(teacher, whole)
    found = read_tensors(path) if path.is_file() else {}
    if key not in found:
        told(f"computing the teacher's answers to {len(whole)} samples")
        batches = data.epoch(0, 0, 256, shuffle=False)
        answers = torch.cat([_answer(teacher, b.inputs, torch.device("cpu")) for b in batches])
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(path) as partial:
                save_tensors({key: answers}, partial)
        found = {key: answers}
    return labelled(whole.inputs, whole.targets, data.origin, found[key])


def _fingerprint(teacher: nn.Module, whole: Batch) -> str:
    """What the answers depend on: the weights and the inputs."""
    digest = hashlib.sha256()
    tensors = {f"teacher.{name}": t for name, t in named_tensors(teacher).items()}
    tensors |= {f"args.{i}": t for i, t in enumerate(whole.inputs.args)}
    for name, tensor in (tensors | whole.inputs.kwargs).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
