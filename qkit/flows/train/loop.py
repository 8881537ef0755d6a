"""The loop: epochs of steps on Hugging Face accelerate, which knows devices, precisions and
processes; it can be killed and resumed at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError, UsageError
from qkit.flows.ptq import Progress, check_tensors, no_progress
from qkit.flows.train.check import as_train_data, check_classes, check_data
from qkit.flows.train.checkpoint import (
    BEST,
    LAST,
    Progressed,
    load_model,
    read_facts,
    resume_from,
    write_checkpoint,
)
from qkit.flows.train.norms import GlobalBatchNorm
from qkit.flows.train.options import TrainOptions
from qkit.flows.train.process import groups, is_shared, local_part, own_randomness, seed_all, start
from qkit.flows.train.record import Told, in_words, log_file, write_metrics
from qkit.flows.train.samples import Batch, TrainData
from qkit.flows.train.score import (
    Metric,
    Objective,
    Score,
    evaluate,
    metric_of,
    objective_of,
)
from qkit.flows.train.tables import OPTIMIZERS, learning_rate
from qkit.report import peak_rss_bytes
from qkit.targets.staging import as_output_error
from qkit.targets.weights import named_tensors


@dataclass(frozen=True)
class Trained:
    """What a run did: a row of figures for each epoch, the ``best`` of the metric and the epoch it
    is of, seconds (of all its parts), peak memory, and the folder of the checkpoints."""

    history: list[dict[str, Any]]
    metric: str
    best: float
    best_epoch: int
    seconds: float
    peak_rss_bytes: int
    folder: Path | None

    def to_json(self) -> dict[str, Any]:
        """All of it but the folder, as plain data."""
        return {name: value for name, value in vars(self).items() if name != "folder"}


def train(
    model: nn.Module,
    data: TrainData | Iterable[Any],
    *,
    val: TrainData | Iterable[Any] | None = None,
    options: TrainOptions | None = None,
    loss: str | Score = "cross-entropy",
    objective: Objective | None = None,
    metric: str | Score | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    origin: dict[str, Any] | None = None,
    on_epoch: Callable[[int], None] = lambda epoch: None,
    progress: Progress = no_progress,
    told: Told = lambda text: None,
) -> Trained:
    """Train ``model`` in place with ``data``; it ends in eval mode, with the weights to keep.

    ``data`` and ``val`` are :class:`TrainData` (:func:`labelled`, :func:`open_train`) or an
    iterable of batches. ``loss`` is a key of :data:`~qkit.flows.train.tables.LOSSES` or a
    function of outputs and targets; an ``objective`` of the whole output and batch replaces it in
    training. ``metric`` is one of :data:`~qkit.flows.train.tables.METRICS`, a function (more is
    better), or what goes with the loss. ``folder`` receives checkpoints, ``metrics.csv``,
    ``train.log`` and, with matplotlib, a plot; ``resume`` goes on with the last checkpoint
    there, and ends with the weights of a run that was never stopped (on a CPU; a GPU's sums
    differ). ``origin`` is what else must be the same then. ``on_epoch`` is called before each epoch
    that is run or gone on with, and sets what depends on it.

    Raises, before any step, :class:`~qkit.errors.InputError` for data or targets that do not fit
    the model and for weights that are not finite, :class:`~qkit.errors.UsageError` for unknown
    names and a run to resume that was another one, and :class:`~qkit.errors.MissingExtraError`;
    later :class:`~qkit.errors.InputError` if the loss is not finite.
    """
    options = options or TrainOptions()
    out = None if folder is None else Path(folder)
    named = metric_of(metric, loss)
    own = objective_of(loss)
    check_tensors(model)
    data = as_train_data(data)
    val = None if val is None else as_train_data(val)
    check_data(model, data, objective or own, None if objective else loss)
    if val is not None:
        check_classes(data, val)
        check_data(model, val, own, loss)
    with own_randomness(), log_file(_prepared(out, resume), told) as said:
        running = _Run(
            model=model,
            data=data,
            val=val,
            options=options,
            objective=objective or own,
            loss=loss,
            metric=named,
            score=metric,
            folder=out,
            on_epoch=on_epoch,
            progress=progress,
            told=said,
            accelerator=start(options, out),
        )
        running.begin(resume, origin or {})
        return running.finish()


def _prepared(folder: Path | None, resume: bool) -> Path | None:
    if folder is None:
        if resume:
            raise UsageError("nothing to resume without a folder of checkpoints")
        return None
    if (folder / LAST).exists() and not resume:
        raise UsageError(
            "the folder holds the checkpoints of a run",
            where=str(folder),
            fix="resume that run, remove the folder, or name another one",
        )
    with as_output_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.partial-*"):
            stale.unlink(missing_ok=True)
    return folder


@dataclass
class _Run:
    """A run in the making."""

    model: nn.Module
    data: TrainData
    val: TrainData | None
    options: TrainOptions
    objective: Objective
    loss: str | Score
    metric: Metric
    score: str | Score | None
    folder: Path | None
    on_epoch: Callable[[int], None]
    progress: Progress
    told: Told
    accelerator: Any
    done: Progressed = field(default_factory=Progressed)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, resume: bool, origin: dict[str, Any]) -> None:
        """Set up model and optimizer, as they were when the run to ``resume`` was stopped."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise UsageError("the model has nothing to train: no parameter requires a gradient")
        optimizer = OPTIMIZERS[self.options.optimizer](trained, self.options)
        self.wrapped, self.stepper = self.accelerator.prepare(self.model, optimizer)
        self.optimizer = optimizer
        self.processes = self.accelerator.num_processes
        self.size = self.options.batch_size * self.processes
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__qualname__", "")
        self.origin = {
            "options": self.options.decisive(),
            "data": [self.data.origin, self.data.samples, self.data.batches],
            "loss": loss,
            "processes": self.processes,
        } | origin
        last = None if self.folder is None else self.folder / LAST
        if resume and last is not None and last.exists():
            self.done = resume_from(last, self.model, self.optimizer, self.origin)
            self.told(f"resumed: epoch {self.done.epoch + 1}, after {self.done.step} steps of it")
        elif resume:
            self.told("nothing to resume: starting from the beginning")
        self.clock = time.perf_counter() - self.done.seconds
        self.saved = time.perf_counter()

    def finish(self) -> Trained:
        """Run what is left, put the weights to keep into the model, and say what was done."""
        while self.done.epoch < self.options.epochs and not self._patience_ended():
            self._epoch()
        self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self._keep()
        self.model.eval()
        if self.options.trackers:
            self.accelerator.end_training()
        assert self.done.best is not None
        assert self.done.best_epoch is not None
        return Trained(
            self.done.history,
            self.metric[0],
            self.done.best,
            self.done.best_epoch,
            round(self.done.seconds, 3),
            peak_rss_bytes(),
            self.folder,
        )

    def _patience_ended(self) -> bool:
        if self.options.patience is None or self.done.best_epoch is None:
            return False
        ended = self.done.epoch - self.done.best_epoch >= self.options.patience
        if ended:
            name, epoch = self.metric[0], self.done.best_epoch
            self.told(f"stopped early: no better {name} since epoch {epoch}")
        return ended

    def _epoch(self) -> None:
        done, options = self.done, self.options
        self.on_epoch(done.epoch)
        self.model.train()
        seed_all(options.seed, done.epoch)
        batches = self.data.epoch(done.epoch, options.seed, self.size, shuffle=True)
        stream = groups(batches, options.accumulate)
        length = self.data.length(self.size)
        steps = None if length is None else -(-length // options.accumulate)
        skipped = sum(1 for _ in zip(range(done.step), stream, strict=False))
        if skipped < done.step:
            raise InputError("the training data are shorter than before", where=self.data.origin)
        rank = self.accelerator.process_index
        while True:
            seed_all(options.seed, done.epoch, done.step, rank)
            group = next(stream, None)
            if group is None:
                break
            place, step = (0.0, 1.0) if steps is None else (done.step / steps, 1 / steps)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate(options, done.epoch, place, step)
            self._step(group)
            done.step += 1
            done.steps += 1
            self.progress(done.steps, options.epochs * (steps or 0), self._status())
            since = time.perf_counter() - self.saved
            if self.processes == 1 and since >= options.save_seconds and done.step != steps:
                self._save(LAST)
        self._close()

    def _step(self, group: list[Batch]) -> None:
        rank, done = self.accelerator.process_index, self.done
        total = sum(map(len, group))
        self.stepper.zero_grad()
        for index, whole in enumerate(group):
            batch = local_part(whole, rank, self.processes).to(self.accelerator.device)
            last = index == len(group) - 1
            shared = is_shared(whole, self.processes)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with GlobalBatchNorm() if self.processes > 1 else nullcontext():
                    output = self.wrapped(*batch.inputs.args, **batch.inputs.kwargs)
                    loss = self.objective(output, batch)
                value = float(loss.detach())
                if not abs(value) < float("inf"):
                    raise InputError(
                        "the loss is not finite: the training diverges",
                        where=f"epoch {done.epoch + 1}, step {done.step + 1}",
                        got=value,
                        fix="a smaller learning rate, a warm-up, or a limit for gradients (clip)",
                    )
                # Gradients are averaged over processes, and summed over parts.
                parts = self.processes if shared else 1
                self.accelerator.backward(loss * (len(batch) * parts / total))
            if shared or rank == 0:
                done.loss += value * len(batch)
                done.samples += len(batch)
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.options.clip)
        self.stepper.step()

    def _status(self) -> str:
        done, name = self.done, f"val_{self.metric[0]}"
        loss = done.loss / max(done.samples, 1)
        text = f"epoch {done.epoch + 1}/{self.options.epochs} loss {loss:.4g}"
        if done.history and name in done.history[-1]:
            text += f" {self.metric[0]} {done.history[-1][name]:.4g}"
        return text

    def _close(self) -> None:
        """The end of an epoch: figures, the best so far, checkpoints."""
        done = self.done
        loss, samples = self._summed(done.loss, done.samples)
        done.seconds = time.perf_counter() - self.clock
        row: dict[str, Any] = {
            "epoch": done.epoch + 1,
            "step": done.steps,
            "loss": loss / max(samples, 1),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if self.val is not None:
            row |= {f"val_{k}": v for k, v in self._evaluated().items()}
        row |= {"seconds": round(done.seconds, 3), "peak_rss_bytes": peak_rss_bytes()}
        if torch.cuda.is_available():
            row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        done.history.append(row)
        done.epoch, done.step, done.loss, done.samples = done.epoch + 1, 0, 0.0, 0
        value = row["loss" if self.val is None else f"val_{self.metric[0]}"]
        larger = self.val is not None and self.metric[2]
        if done.best is None or (value > done.best if larger else value < done.best):
            done.best, done.best_epoch = value, done.epoch
            if self.folder is None:
                self.best_weights = {n: t.clone() for n, t in named_tensors(self.model).items()}
            self._save(BEST, weights=True)
        self._save(LAST)
        if self.folder is not None and self.accelerator.is_main_process:
            write_metrics(self.folder, done.history)
        if self.options.trackers:
            numbers = {k: v for k, v in row.items() if k not in ("epoch", "step")}
            self.accelerator.log(numbers, step=done.steps)
        if self.accelerator.is_main_process:
            self.told(in_words(row))

    def _evaluated(self) -> dict[str, float]:
        """The figures of the validation data; every process has the buffers of the first one."""
        assert self.val is not None
        if self.processes > 1:
            for tensor in self.model.buffers():
                torch.distributed.broadcast(tensor, 0)
        return evaluate(
            self.model,
            self.val,
            loss=self.loss,
            metric=self.score,
            batch_size=self.options.batch_size,
            device=self.accelerator.device,
        )

    def _summed(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(sums, "sum").tolist() if self.processes > 1 else [*values]

    def _save(self, name: str, *, weights: bool = False) -> None:
        """Write a checkpoint; one of ``weights`` alone has no optimizer."""
        self.done.seconds = time.perf_counter() - self.clock
        if self.folder is not None and self.accelerator.is_main_process:
            write_checkpoint(
                self.folder / name,
                self.model,
                None if weights else self.optimizer,
                self.done,
                self.origin,
            )
        self.saved = time.perf_counter()

    def _keep(self) -> None:
        if self.options.keep == "last" or self.done.best_epoch == self.done.epoch:
            return
        tensors, path = {f"model.{k}": t for k, t in self.best_weights.items()}, Path(BEST)
        if self.folder is not None:
            self.accelerator.wait_for_everyone()
            path = self.folder / BEST
            tensors = read_facts(path)[2]
        load_model(self.model, tensors, path)
