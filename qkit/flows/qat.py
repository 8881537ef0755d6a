"""Quantization-aware training: the PT2E flow with fake quantization that is trained.

The graph is captured as it will be deployed, and trained as that graph computes: what is converted
is, but for the rounding of sums, what was trained (:data:`IDENTITY_DB` is checked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.distill import hard_and_soft, soft_targets
from qkit.distill.losses import check_temperature, check_weight
from qkit.errors import RequestError, UsageError, VerificationError
from qkit.flows.data import Data
from qkit.flows.evaluate import LARGE_ERROR, eval_mode
from qkit.flows.pt2e import nothing, without_unused
from qkit.flows.ptq import Progress, check_rules, check_tensors, no_progress
from qkit.flows.train import TrainData, Trained, TrainOptions, scores, train
from qkit.flows.train.score import Objective, Score, objective_of
from qkit.flows.train.tables import main_output
from qkit.graph import Dialect, capture, find_sites, quiet
from qkit.graph.capture import Dims
from qkit.graph.sites import Site, when
from qkit.models import Inputs, run
from qkit.report import Report, compare
from qkit.spec import Recipe
from qkit.targets import require_packages
from qkit.targets.backend import Converted

# What the converted program may differ from the one that was trained: rounding of sums in fp32.
IDENTITY_DB = 100.0
# Batches that give activations their first ranges.
FIRST_BATCHES = 8
SUFFIX = "-qat"


@dataclass(frozen=True)
class Qat:
    """How a quantized model is trained; names are those of :func:`qkit.flows.train.train`.

    After ``freeze_ranges`` epochs the ranges of weights and activations stay, after
    ``freeze_norms`` the statistics of batch normalisations (two thirds of the epochs each, unless
    said). With ``lsq`` the loss trains the steps of weights and activations too, until then
    (:class:`qkit.graph.fake.PerChannelLearned`). With ``teacher`` (0 to 1) the loss is mixed with
    that against the float model's outputs, softened by ``temperature``.
    """

    data: TrainData
    val: TrainData | None = None
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=6, lr=2e-4))
    loss: str | Score = "cross-entropy"
    metric: str | Score | None = None
    folder: Path | None = None
    resume: bool = False
    freeze_ranges: int | None = None
    freeze_norms: int | None = None
    teacher: float = 0.0
    temperature: float = 2.0
    lsq: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weight(self.teacher)
        check_temperature(self.temperature)
        for name in ("freeze_ranges", "freeze_norms"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is a number of epochs", got=value)

    def frozen_after(self, epochs: int | None) -> int:
        """The first epoch in which something is frozen."""
        return -(-2 * self.options.epochs // 3) if epochs is None else epochs

    def inputs(self) -> Data:
        """The training inputs as calibration data."""
        size = self.options.batch_size

        def stream() -> Iterator[Inputs]:
            return (batch.inputs for batch in self.data.epoch(0, 0, size, shuffle=False))

        return Data(self.data.origin, stream, self.data.samples)

    def to_json(self) -> dict[str, Any]:
        """What decided about the result, as plain data."""
        names = ("freeze_ranges", "freeze_norms", "teacher", "temperature", "lsq")
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "")
        return {
            "options": self.options.to_json(),
            "data": self.data.origin,
            "val": None if self.val is None else self.val.origin,
            "loss": loss,
        } | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Tuned:
    """A converted program, the float ``weights`` that were trained (normalisations folded), the
    figures of the training, and the ``metrics`` of the float and the converted model."""

    converted: Converted
    weights: dict[str, Tensor]
    trained: Trained
    identity_db: float | None
    metrics: dict[str, dict[str, float]]


def trained_scheme(text: str) -> str | None:
    """What a scheme that is trained is without the training: of ``int8-qat``, ``int8-static``; None
    for other schemes."""
    name = text.strip().lower().replace("_", "-")
    return name.removesuffix(SUFFIX) + "-static" if name.endswith(SUFFIX) else None


def train_quantized(
    model: nn.Module,
    recipe: Recipe,
    qat: Qat,
    *,
    dialect: Dialect,
    dims: Dims | None = None,
    quantizer: Any = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Train ``model``, quantized by ``recipe`` as ``dialect`` has it, and convert the result.

    ``model`` is not changed: it is the teacher, if there is one. ``dims``, ``quantizer`` and
    ``options`` are as in :func:`qkit.flows.pt2e.convert`, a quantizer with annotations by
    :class:`~qkit.graph.fake.PerChannelFake`. Raises what :func:`~qkit.flows.pt2e.convert` and
    :func:`~qkit.flows.train.train` raise, and :class:`~qkit.errors.RequestError` for a model that
    takes one size of batches only.
    """
    require_packages(["torchao"], "pt2e", "quantization-aware training")
    require_packages(["accelerate"], "train", "quantization-aware training")
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    if quantizer is None and not any(when(scheme) == "static" for scheme in schemes):
        raise UsageError(
            "training learns with static ranges of activations",
            got=", ".join(scheme.name for scheme in schemes),
            wanted="int8-qat",
        )
    check_rules(recipe, model)
    check_tensors(model)
    example = qat.inputs().head(2)
    with eval_mode(model):
        run(model, example)
        captured = capture(model, example.args, example.kwargs, dims=dims)
    if captured.shapes is None:
        raise RequestError(
            "the model takes one size of batches only, and training needs any",
            got=captured.notes[0],
        )
    prepared, sites = _prepared(captured.module(), recipe, dialect, quantizer, lsq=qat.lsq)
    _first_ranges(prepared, qat)
    trained = train(
        prepared,
        qat.data,
        val=qat.val,
        options=qat.options,
        loss=qat.loss,
        objective=_objective(model, qat),
        metric=qat.metric,
        folder=qat.folder,
        resume=qat.resume,
        origin=_origin(qat, dialect, recipe),
        on_epoch=lambda epoch: _freeze(prepared, qat, epoch),
        progress=progress,
        told=told,
    )
    program, weights, identity = _converted(prepared.cpu(), example)
    expected = sum(site.layers for site in sites if site.scheme is not None)
    seen = qat.data.samples or FIRST_BATCHES * qat.options.batch_size
    converted = Converted(
        captured, program, tuple(sites), expected, dict(options or {}), samples=seen
    )
    judged = qat.val or qat.data
    models = {"float": model, "trained int8": program}
    metrics = scores(models, judged, loss=qat.loss, metric=qat.metric)
    return Tuned(converted, weights, trained, identity, metrics)


def _origin(qat: Qat, dialect: Dialect, recipe: Recipe) -> dict[str, Any]:
    """What a run to resume must have in common with this one, besides what the loop knows."""
    facts = {name: value for name, value in qat.to_json().items() if name != "options"}
    return facts | {"dialect": dialect.name, "recipe": recipe.to_json()} | qat.origin


def _prepared(
    module: fx.GraphModule, recipe: Recipe, dialect: Dialect, quantizer: Any, *, lsq: bool
) -> tuple[fx.GraphModule, list[Site]]:
    from qkit.graph.annotate import RecipeQuantizer, name_observers
    from qkit.graph.ao import prepare_pt2e
    from qkit.graph.fake import PerChannelFake, PerChannelLearned, fake_biases
    from qkit.graph.norms import fold, own_tensors, unfold
    from qkit.graph.tables import dense_gradients

    own_tensors(module)
    dense_gradients(module)
    fold(module)
    if quantizer is None:
        sites = find_sites(module, recipe, dialect)
        if all(site.scheme is None for site in sites if not site.table):
            raise nothing(sites)
        watcher = PerChannelLearned if lsq else PerChannelFake
        quantizer = RecipeQuantizer(recipe, dialect, "moving-average", watcher)
    with quiet():
        prepared = prepare_pt2e(module, quantizer)
    name_observers(prepared)
    fake_biases(prepared)
    unfold(prepared)
    # torchao forbids both; here modules know what they mean.
    prepared.__dict__.pop("train", None)
    prepared.__dict__.pop("eval", None)
    return prepared, getattr(quantizer, "sites", [])


def _first_ranges(prepared: fx.GraphModule, qat: Qat) -> None:
    from qkit.graph.fake import learn_steps, move_ranges

    move_ranges(prepared, "always")
    prepared.eval()
    for batch in islice(qat.inputs().stream(), FIRST_BATCHES):
        run(prepared, batch)
    learn_steps(prepared)
    move_ranges(prepared, "training")


def _freeze(prepared: fx.GraphModule, qat: Qat, epoch: int) -> None:
    from qkit.graph.fake import move_ranges
    from qkit.graph.norms import freeze

    move_ranges(prepared, "never" if epoch >= qat.frozen_after(qat.freeze_ranges) else "training")
    freeze(prepared, epoch >= qat.frozen_after(qat.freeze_norms))


def _objective(model: nn.Module, qat: Qat) -> Objective | None:
    """The loss mixed with that against the float model; None without a teacher."""
    if not qat.teacher:
        return None
    hard = objective_of(qat.loss)

    def objective(output: Any, batch: Any) -> Tensor:
        with torch.no_grad(), eval_mode(model):
            wanted = main_output(model(*batch.inputs.args, **batch.inputs.kwargs))
        soft = soft_targets(main_output(output), wanted, qat.temperature)
        known = None if batch.targets is None else hard(output, batch)
        return hard_and_soft(known, soft, qat.teacher)

    return objective


def _converted(
    prepared: fx.GraphModule, example: Inputs
) -> tuple[fx.GraphModule, dict[str, Tensor], float | None]:
    """The converted program, the float weights, and how near it is to what was trained."""
    from qkit.graph.ao import convert_pt2e
    from qkit.graph.norms import plain_norms, settle
    from qkit.graph.tables import look_up_codes

    prepared.eval()
    wanted = run(prepared, example)
    weights = {name: tensor.clone() for name, tensor in settle(prepared).items()}
    with quiet():
        program = convert_pt2e(prepared)
    plain_norms(program)
    program = without_unused(look_up_codes(program))
    found = compare(wanted, run(program, example)).sqnr_db
    if found is not None and found < IDENTITY_DB:
        raise VerificationError(
            "the converted program is not what was trained",
            got=f"SQNR {found:.1f} dB",
            wanted=f"at least {IDENTITY_DB:.0f} dB",
        )
    return program, weights, found


def fill_training(report: Report, qat: Qat, tuned: Tuned) -> None:
    """What the training was, and what it gave."""
    report.scheme_long += ", learnt by training"
    report.training = qat.to_json() | tuned.trained.to_json() | {"identity_db": tuned.identity_db}
    report.metrics |= tuned.metrics
    # Weights have moved: how far the outputs are from the float model's says nothing of the loss.
    report.remarks = [text for text in report.remarks if not text.startswith(LARGE_ERROR)]
    judged = "the training data" if qat.val is None else qat.val.origin
    report.remarks.append(
        f"trained for {len(tuned.trained.history)} epochs on {qat.data.origin}: the output error "
        "is the distance to the float model, which training changes; judge by the metrics, on "
        f"{judged}"
    )
