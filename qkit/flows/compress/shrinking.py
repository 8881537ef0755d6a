"""Steps that make a model smaller and leave its weights floats: factorize, prune, sparsify."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkit.errors import UsageError
from qkit.flows.compress.given import Given, Options, check_nested, typed
from qkit.flows.compress.kinds import StepKind, names_fit
from qkit.flows.factorize import factorize
from qkit.flows.factors import Wanted as Factors
from qkit.flows.iterate import (
    Steps,
    check_share,
    check_unit,
    prune_iteratively,
    sparsify_iteratively,
)
from qkit.flows.prune import prune
from qkit.flows.sparsify import (
    CALIBRATED,
    GRADIENTS,
    METHODS,
    check_sparsify,
    sparsify,
    sparsities,
)
from qkit.pruning.importance import check_importance
from qkit.pruning.plan import ROUND_TO, Limits, check_amount
from qkit.pruning.structured import UNITS
from qkit.spec.plain import show

# In how many steps with a training after each, and what ends them: :class:`Steps`.
_STEPS: Options = {"steps": 1, "schedule": "geometric", "drop": None, "floor": None, "train": None}


def _check_steps(step: str, options: Options) -> None:
    changed = [n for n in ("steps", "drop", "floor") if options[n] != _STEPS[n]]
    if changed and options["train"] is None:
        raise UsageError(
            f"the option {changed[0]!r} of {step!r} is for pruning with a training after each step",
            fix="train: {epochs: 3}",
        )
    with typed(step):
        Steps(options["steps"], options["schedule"], options["drop"], options["floor"])
    check_nested(step, options)


def _taken(options: Options, given: Given) -> tuple[Options, Options | None]:
    """The options without those of steps, and what the functions of :mod:`qkit.flows.iterate` take
    for these; None where the step is one, without training."""
    rest = {name: value for name, value in options.items() if name not in _STEPS}
    if options["train"] is None:
        return rest, None
    evaluate, sign = given.goodness()
    how: Options = {name: options[name] for name in _STEPS if name != "train"}
    if how["floor"] is not None:
        how["floor"] *= sign
    how["evaluate"], how["told"] = evaluate, given.told
    how["tune"] = lambda model: given.fit(model, options["train"])
    return rest, how


def _check_factorize(options: Options) -> None:
    with typed("factorize"):
        Factors(**options | {"ignore": tuple(options["ignore"])})


def _factorize(model: nn.Module, options: Options, given: Given) -> nn.Module:
    data = {"inputs": given.inputs} if given.calib is None else {"calib": given.calib}
    return factorize(model, latency=False, **options, **data)[0]


def _check_prune(options: Options) -> None:
    with typed("prune"):
        check_amount(options["amount"])
        check_importance(options["importance"])
        Limits(options["keep"], options["round_to"], options["per_layer"])
    for name in ("per_layer", "through_norms", "blocks"):
        if type(options[name]) is not bool:
            raise UsageError(f"{name} of 'prune' is true or false", got=show(options[name]))
    if options["unit"] not in UNITS:
        raise UsageError("unknown unit", got=show(options["unit"]), wanted=", ".join(UNITS))
    _check_steps("prune", options)
    if options["train"] is not None:
        check_unit(options["unit"])


def _prune(model: nn.Module, options: Options, given: Given) -> nn.Module:
    options, how = _taken(options, given)
    loss = given.total_loss if options["importance"] == "taylor" else None
    both: dict[str, Any] = {"latency": False, "seed": given.seed, "loss": loss}
    if how is None:
        return prune(model, given.inputs, **both, **options)[0]
    return prune_iteratively(model, given.inputs, **both, **how, **options)[0]


def _scoped(options: Options) -> Options:
    """What decides which weights compete."""
    scope = options["scope"] or METHODS[options["method"]]
    return {"amount": options["amount"], "scope": scope, "biases": options["biases"]}


def _sparsify_fits(model: nn.Module, options: Options, given: Given) -> None:
    names_fit(model, options, given)
    check_sparsify(model, **_scoped(options), ignore=options["ignore"])


def _check_sparsify(options: Options) -> None:
    method = options["method"]
    if method not in METHODS:
        raise UsageError("unknown method", got=show(method), wanted=", ".join(METHODS))
    with typed("sparsify"):
        sparsities(**_scoped(options))
    _check_steps("sparsify", options)
    if options["train"] is not None:
        check_share(options["amount"])


def _sparsify(model: nn.Module, options: Options, given: Given) -> nn.Module:
    options, how = _taken(options, given)
    options["calib"] = given.calib if options["method"] in CALIBRATED else None
    options["loss"] = given.losses if options["method"] in GRADIENTS else None
    if how is None:
        return sparsify(model, seed=given.seed, **options)[0]
    return sparsify_iteratively(model, seed=given.seed, **how, **options)[0]


SHRINKING: dict[str, StepKind] = {
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
        renames=True,
        zeros=False,
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
            "blocks": False,
        }
        | _STEPS,
        _check_prune,
        _prune,
        labelled=lambda options: options["train"] is not None or options["importance"] == "taylor",
    ),
    "sparsify": StepKind(
        "zeros in place of single weights",
        {"amount": 0.5, "method": "magnitude", "scope": None, "biases": False, "ignore": []}
        | _STEPS,
        _check_sparsify,
        _sparsify,
        fits=_sparsify_fits,
        labelled=lambda options: options["train"] is not None or options["method"] in GRADIENTS,
        real=lambda options: options["method"] in CALIBRATED,
    ),
}
