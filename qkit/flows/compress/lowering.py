"""Steps that write the output for a runtime: export, and qat, which trains what it exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import UsageError
from qkit.flows.algorithm import AUTO, resolve_algorithm
from qkit.flows.check import inputs_of
from qkit.flows.compress.given import (
    Given,
    Options,
    train_options,
    training_defaults,
    training_part,
    typed,
)
from qkit.flows.compress.kinds import StepKind, Written, anything_fits
from qkit.flows.lower import check_request, known_target, lower, requested
from qkit.flows.lower_float import check_float, lower_float
from qkit.flows.qat import Qat
from qkit.graph.sites import when
from qkit.models import Source, leading
from qkit.numerics import OBSERVERS
from qkit.report import Report
from qkit.spec import Scheme, parse
from qkit.spec.plain import show
from qkit.targets.artifact import read_artifact
from qkit.targets.backend import Session, backend

QAT_SCHEME = "int8-static"


class Served(nn.Module):
    """A file in its runtime, called as the model."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        """The outputs, flattened."""
        return self.session(args, kwargs)


def _checked(target: object, scheme: str, options: Options) -> Scheme:
    """The scheme, refused here if the target does not have it."""
    if not isinstance(target, str):
        raise UsageError("a target is a name", got=show(target))
    recipe = requested(scheme, options["ignore"], options.get("algorithm", AUTO), calibrated=True)
    return check_request(recipe, backend(known_target(target)), {})


def _check_export(options: Options) -> None:
    if options["scheme"] is None:
        if options["ignore"]:
            raise UsageError("ignore of 'export' names layers to leave in float: it needs a scheme")
        check_float(options["target"], {})
        return
    with typed("export"):
        _checked(options["target"], options["scheme"], options)
    if options["observer"] not in OBSERVERS:
        raise UsageError(
            "unknown observer", got=show(options["observer"]), wanted=", ".join(OBSERVERS)
        )


def _export(
    model: nn.Module, options: Options, given: Given, out: Path, source: Source, overwrite: bool
) -> Written:
    data, target = given.calib or given.inputs, options["target"]
    if data is None:
        raise UsageError(
            "no inputs are known to capture the model with", fix="input: SHAPE or calib: FILE.npz"
        )
    how: Options = {"source": source, "overwrite": overwrite, "told": given.told, "target": target}
    if options["scheme"] is None:
        return _written(lower_float(model, out, data, **how), out, target)
    scheme = parse(options["scheme"])
    algorithm = resolve_algorithm(scheme, options["algorithm"], calibrated=given.calib is not None)
    rest = {name: options[name] for name in ("ignore", "observer")}
    report = lower(model, scheme, out, calib=data, algorithm=algorithm, **rest, **how)
    return _written(report, out, target)


def _check_qat(options: Options) -> None:
    with typed("qat"):
        _checked(options["target"], QAT_SCHEME, options)
        _qat(options, None, Given(None))


def _qat(options: Options, data: Any, given: Given) -> Qat:
    """The training of a step; its defaults are those of ``qkit quantize --scheme int8-qat``."""
    names = ("freeze_ranges", "freeze_norms", "teacher", "temperature")
    chosen, scored = train_options(training_part(options), given.seed), dict[str, Any](given.scored)
    rest = {name: options[name] for name in names}
    return Qat(data, given.val, options=chosen, **rest, **scored, **given.checkpoints())


def _train_quantized(
    model: nn.Module, options: Options, given: Given, out: Path, source: Source, overwrite: bool
) -> Written:
    report = lower(
        model,
        QAT_SCHEME,
        out,
        target=options["target"],
        ignore=options["ignore"],
        qat=_qat(options, given.data, given),
        source=source,
        overwrite=overwrite,
        told=given.told,
    )
    return _written(report, out, options["target"])


def _written(report: Report, out: Path, target: str) -> Written:
    runtime, artifact = backend(target), read_artifact(out)
    file = out / runtime.file
    session = runtime.load(file, torch.get_num_threads())
    # As many samples as it was verified with: the program may be of a fixed or a bounded batch.
    return Written(report, Served(session), file, leading(inputs_of(artifact)))


def _static(options: Options) -> bool:
    return options["scheme"] is not None and when(parse(options["scheme"])) == "static"


LOWERING: dict[str, StepKind] = {
    "qat": StepKind(
        "training with the rounding of a runtime's int8, and its file",
        {
            "target": "onnx",
            "ignore": [],
            "teacher": 0.0,
            "temperature": 2.0,
            "freeze_ranges": None,
            "freeze_norms": None,
        }
        | training_defaults(epochs=6, lr=2e-4),
        _check_qat,
        write=_train_quantized,
        fits=anything_fits,
        fixes=True,
        labelled=lambda options: True,
    ),
    "export": StepKind(
        "the file of a runtime, in float or quantized by a scheme",
        {"target": "onnx", "scheme": None, "ignore": [], "algorithm": AUTO, "observer": "minmax"},
        _check_export,
        write=_export,
        fits=anything_fits,
        fixes=True,
        real=_static,
    ),
}
