"""The steps that a recipe may name: each is a row of :data:`STEPS`, and nothing else knows them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from qkit.algorithms.sparse import Sparsity
from qkit.errors import UsageError
from qkit.flows.cluster import cluster
from qkit.flows.factorize import factorize
from qkit.flows.factors import Wanted as Factors
from qkit.flows.prune import prune
from qkit.flows.quantize import quantize, resolve_recipe
from qkit.flows.sparsify import METHODS, sparsify
from qkit.flows.train import TrainData, TrainOptions, train
from qkit.models import Inputs
from qkit.pruning.importance import check_importance
from qkit.pruning.masks import Masks
from qkit.pruning.plan import ROUND_TO, check_amount
from qkit.pruning.structured import UNITS
from qkit.spec.plain import show

Options = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What the steps of one run have: ``inputs`` to trace and compare on, ``calib`` (the same, but
    real) to learn from, and labelled ``data`` to train and score with, where there are some."""

    inputs: Inputs | None
    calib: Inputs | None = None
    data: TrainData | None = None
    val: TrainData | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepKind:
    """A row of the table. ``options`` are the names and defaults, ``check`` refuses impossible
    values, ``run`` returns the new model. ``fixes`` says that the step fixes the values of the
    weights (no other step may change them later), ``trains`` tells from its options whether it
    needs labelled data, ``real`` whether it needs real inputs."""

    summary: str
    options: Options
    check: Callable[[Options], None]
    run: Callable[[nn.Module, Options, Given], nn.Module]
    fixes: bool = False
    trains: Callable[[Options], bool] = lambda options: False
    real: Callable[[Options], bool] = lambda options: False


def _train_options(options: Mapping[str, Any], seed: int = 0) -> TrainOptions:
    """The options of a training run that a recipe gives."""
    known = {field.name for field in fields(TrainOptions)} - {"seed", "trackers"}
    if unknown := set(options) - known:
        raise UsageError(
            "unknown option of training",
            got=", ".join(sorted(unknown)),
            wanted=", ".join(sorted(known)),
        )
    with _typed("train"):
        return TrainOptions(**options, seed=seed)


@contextmanager
def _typed(step: str) -> Iterator[None]:
    """A value of another type (an epoch count that is a word, say) is a wrong request."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"an option of the step {step!r} has another type: {error}") from error


def _check_factorize(options: Options) -> None:
    with _typed("factorize"):
        Factors(**options | {"ignore": tuple(options["ignore"])})


def _check_prune(options: Options) -> None:
    with _typed("prune"):
        check_amount(options["amount"])
        check_importance(options["importance"])
    if options["importance"] == "taylor":
        raise UsageError("the importance 'taylor' needs a loss, which a recipe cannot name yet")
    if options["unit"] not in UNITS:
        raise UsageError("unknown unit", got=show(options["unit"]), wanted=", ".join(UNITS))


_DATA_FREE, _CALIBRATED = ("magnitude", "random"), ("wanda", "sparsegpt")


def _check_sparsify(options: Options) -> None:
    known, method = (*_DATA_FREE, *_CALIBRATED), options["method"]
    if method not in known:
        raise UsageError("unknown method", got=show(method), wanted=", ".join(known))
    with _typed("sparsify"):
        Sparsity.parse(options["amount"], options["scope"] or METHODS[method])


def _check_cluster(options: Options) -> None:
    entries = options["entries"]
    if type(entries) is not int or not 2 <= entries <= 256:
        raise UsageError("weights are clustered to 2 to 256 values", got=show(entries))
    if options["train"] is not None:
        if not isinstance(options["train"], dict):
            raise UsageError("train has options of its own", got=show(options["train"]))
        _train_options(options["train"])


def _check_quantize(options: Options) -> None:
    calibrated = options["algorithm"] != "rtn"
    resolve_recipe(
        options["scheme"],
        ignore=options["ignore"],
        algorithm=options["algorithm"],
        calibrated=calibrated,
    )


def _factorize(model: nn.Module, options: Options, given: Given) -> nn.Module:
    data = {"inputs": given.inputs} if given.calib is None else {"calib": given.calib}
    return factorize(model, latency=False, **options, **data)[0]


def _prune(model: nn.Module, options: Options, given: Given) -> nn.Module:
    return prune(model, given.inputs, latency=False, seed=given.seed, **options)[0]


def _sparsify(model: nn.Module, options: Options, given: Given) -> nn.Module:
    real = options["method"] in _CALIBRATED
    return sparsify(model, seed=given.seed, calib=given.calib if real else None, **options)[0]


def _train(model: nn.Module, options: Options, given: Given) -> nn.Module:
    assert given.data is not None
    model = copy.deepcopy(model)
    with Masks.of(model).hold(model):  # what an earlier step has made zero
        train(model, given.data, val=given.val, options=_train_options(options, given.seed))
    return model


def _cluster(model: nn.Module, options: Options, given: Given) -> nn.Module:
    def tune(trainable: nn.Module) -> None:
        assert given.data is not None
        chosen = _train_options(options["train"], given.seed)
        train(trainable, given.data, val=given.val, options=chosen)

    return cluster(
        model,
        options["entries"],
        ignore=options["ignore"],
        tune=None if options["train"] is None else tune,
        inputs=given.inputs,
        latency=False,
    )[0]


def _quantize(model: nn.Module, options: Options, given: Given) -> nn.Module:
    data = {"inputs": given.inputs} if given.calib is None else {"calib": given.calib}
    return quantize(model, latency=False, **options, **data)[0]


STEPS: dict[str, StepKind] = {
    "factorize": StepKind(
        "large layers as two or more small ones",
        {
            "amount": None,
            "energy": None,
            "rank": None,
            "sensitivity": False,
            "conv": "channel",
            "ignore": [],
        },
        _check_factorize,
        _factorize,
    ),
    "prune": StepKind(
        "fewer channels, neurons and heads",
        {
            "amount": 0.5,
            "unit": "macs",
            "importance": "l1",
            "ignore": [],
            "keep": 1,
            "round_to": ROUND_TO,
            "per_layer": False,
            "through_norms": False,
        },
        _check_prune,
        _prune,
    ),
    "sparsify": StepKind(
        "zeros in place of single weights",
        {"amount": 0.5, "method": "magnitude", "scope": None, "ignore": []},
        _check_sparsify,
        _sparsify,
        real=lambda options: options["method"] in _CALIBRATED,
    ),
    "train": StepKind(
        "training on labelled data",
        {
            field.name: field.default
            for field in fields(TrainOptions)
            if field.name not in ("seed", "trackers")
        },
        _train_options,  # type: ignore[arg-type]
        _train,
        trains=lambda options: True,
    ),
    "cluster": StepKind(
        "few shared values for each weight",
        {"entries": 16, "ignore": [], "train": None},
        _check_cluster,
        _cluster,
        fixes=True,
        trains=lambda options: options["train"] is not None,
    ),
    "quantize": StepKind(
        "weights of few bits",
        {"scheme": "w8a16", "algorithm": "auto", "ignore": []},
        _check_quantize,
        _quantize,
        fixes=True,
        real=lambda options: options["algorithm"] == "gptq",
    ),
}
