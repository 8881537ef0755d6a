"""Steps after which the weights are codes: cluster, quantize."""

from __future__ import annotations

from torch import nn

from qkit.errors import UsageError
from qkit.flows.cluster import cluster
from qkit.flows.compress.given import Given, Options, check_nested
from qkit.flows.compress.kinds import StepKind
from qkit.flows.quantize import quantize, resolve_recipe
from qkit.spec.plain import show


def _check_cluster(options: Options) -> None:
    entries = options["entries"]
    if type(entries) is not int or not 2 <= entries <= 256:
        raise UsageError("weights are clustered to 2 to 256 values", got=show(entries))
    check_nested("cluster", options)


def _cluster(model: nn.Module, options: Options, given: Given) -> nn.Module:
    def tune(trainable: nn.Module) -> None:
        given.fit(trainable, options["train"])

    return cluster(
        model,
        options["entries"],
        ignore=options["ignore"],
        tune=None if options["train"] is None else tune,
        inputs=given.inputs,
        latency=False,
    )[0]


def _check_quantize(options: Options) -> None:
    resolve_recipe(
        options["scheme"],
        ignore=options["ignore"],
        algorithm=options["algorithm"],
        calibrated=options["algorithm"] != "rtn",
    )


def _quantize(model: nn.Module, options: Options, given: Given) -> nn.Module:
    data = {"inputs": given.inputs} if given.calib is None else {"calib": given.calib}
    return quantize(model, latency=False, **options, **data)[0]


FIXING: dict[str, StepKind] = {
    "cluster": StepKind(
        "few shared values for each weight",
        {"entries": 16, "ignore": [], "train": None},
        _check_cluster,
        _cluster,
        fixes=True,
        labelled=lambda options: options["train"] is not None,
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
