"""Steps that train: on labels, and with the model as it was as a teacher."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qkit.errors import UsageError
from qkit.flows.compress.given import (
    Given,
    Options,
    train_options,
    training_defaults,
    training_part,
    typed,
)
from qkit.flows.compress.kinds import StepKind
from qkit.flows.distill import Teaching, distill
from qkit.flows.distill_file import EPOCHS, TEMPERATURE, WEIGHT, matches_of
from qkit.flows.quantize import resolve_recipe
from qkit.pruning.masks import Masks
from qkit.spec.plain import show


def _train(model: nn.Module, options: Options, given: Given) -> nn.Module:
    model = copy.deepcopy(model)
    given.fit(model, options)
    return model


def _check_distill(options: Options) -> None:
    with typed("distill"):
        Teaching(options["teacher"], options["temperature"])
    train_options(training_part(options))
    match = options["match"]
    if not isinstance(match, list) or not all(isinstance(each, str) for each in match):
        raise UsageError("match of 'distill' is a list of texts", got=show(match))
    if options["teacher_precision"] is not None:
        resolve_recipe(options["teacher_precision"])


def _distill(model: nn.Module, options: Options, given: Given) -> nn.Module:
    assert given.data is not None
    assert given.teacher is not None
    model, scored = copy.deepcopy(model), dict[str, Any](given.scored)
    with Masks.of(model).hold(model):
        distill(
            model,
            given.teacher,
            given.data,
            val=given.val,
            teaching=Teaching(
                options["teacher"],
                options["temperature"],
                matches_of(options["match"], model, given.teacher),
                options["teacher_precision"],
            ),
            options=train_options(training_part(options), given.seed),
            told=given.told,
            **scored,
            **given.checkpoints(),
        )
    return model


LEARNING: dict[str, StepKind] = {
    "train": StepKind(
        "training on labelled data",
        training_defaults(),
        train_options,
        _train,
        labelled=lambda options: True,
    ),
    "distill": StepKind(
        "training with the answers of the model as it was, too",
        {"teacher": WEIGHT, "temperature": TEMPERATURE, "match": [], "teacher_precision": None}
        | training_defaults(epochs=EPOCHS),
        _check_distill,
        _distill,
        follows=True,
        labelled=lambda options: True,
    ),
}
