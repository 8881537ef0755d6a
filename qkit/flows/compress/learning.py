"""Steps that train: on labels, and with the model as it was as a teacher."""

from __future__ import annotations

import copy

from torch import nn

from qkit.distill.losses import check_weight
from qkit.flows.compress.given import (
    TEACHING,
    Given,
    Options,
    check_learning,
    train_options,
    training_defaults,
    typed,
)
from qkit.flows.compress.kinds import StepKind
from qkit.flows.distill_file import EPOCHS, WEIGHT


def _train(model: nn.Module, options: Options, given: Given) -> nn.Module:
    model = copy.deepcopy(model)
    given.fit(model, options)
    return model


def _check_distill(options: Options) -> None:
    with typed("distill"):
        check_weight(options["teacher"])
    check_learning("distill", options)


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
        TEACHING | {"teacher": WEIGHT} | training_defaults(epochs=EPOCHS),
        _check_distill,
        _train,
        follows=True,
        labelled=lambda options: True,
    ),
}
