"""One family by one scheme: quantized, judged against two references, saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families.family import Family
from torch import Tensor, nn

import qkit
from qkit.errors import CoverageError, InputError
from qkit.flows.verify import BOUNDS
from qkit.models import Inputs, run
from qkit.nn import QLayer
from qkit.nn.open import opened_like
from qkit.report import Report, compare
from qkit.spec import parse

# The least cosine of the output to the float model's. What is promised is 0.999 for w8a16 and 0.97
# for w4a16-g32. 1 - cosine is half of the noise power, and a layer's weights add noise 21.3 dB
# below its output (README, "Schemes and targets", Gaussian): 0.97 is what ROW such layers leave.
# Of other schemes, that bound scaled by their noise: 19.6 dB for groups of 128, 20.7 for nf4. Rows
# of int8 activations whose largest value is 4 standard deviations have 127^2 * 12 / 4^2 = 40.8 dB,
# against weights of 42.0: with both, three times w8a16's noise at most.
ROW = 8
LEAST_COSINE = {
    "w8a16": 0.999,
    "w4a16-g32": 0.97,
    "w4a16-g128": 1 - 0.03 * 10 ** ((21.3 - 19.6) / 10),
    "nf4": 1 - 0.03 * 10 ** ((21.3 - 20.7) / 10),
    "w8a8": 1 - 3 * 0.001,
    "w4a8": 1 - 0.03 * 10 ** ((21.3 - 19.6) / 10) - 2 * 0.001,
    "bf16": 0.999,
}
# What libraries say of themselves: torch's fast path for padded input, Dynamo of functions of
# transformers that remember what they returned, and Inductor of TorchScript.
TOLD = (
    "The PyTorch API of nested tensors",
    "Dynamo detected a call to a `functools.lru_cache`",
    "`torch.jit.script_method` is deprecated",
)
MUST_COVER = {"w8a16": 0.95, "w4a16-g32": 0.95}


@dataclass(frozen=True)
class Cell:
    """What became of a family under a scheme: figures, or the ``reason`` why there are none."""

    ratio: float | None = None
    cosine: float | None = None
    covered: float | None = None
    reason: str | None = None


def least_cosine(family: Family, scheme: str) -> float:
    """The bound for ``family``: noise adds up over its depth."""
    return 1 - (1 - LEAST_COSINE[scheme]) * max(1.0, family.depth / ROW)


@dataclass(frozen=True)
class Trial:
    """A quantized family; ``outputs`` are what any process must compute from the files."""

    family: Family
    scheme: str
    qmodel: nn.Module
    report: Report
    outputs: list[Tensor]
    cell: Cell


def given(family: Family) -> Inputs:
    return Inputs((), family.inputs(), family.name)


def attempt(family: Family, scheme: str) -> Trial | Cell:
    """Quantize; a scheme that suits no layer of the model gives its exact reason."""
    model = family.model()
    try:
        qmodel, report = qkit.quantize(model, scheme, inputs=family.inputs(), latency=False)
    except (CoverageError, InputError) as error:
        return Cell(reason=f"{error.problem} ({error.got})")
    cell = Cell(report.size_bytes["ratio"], report.error["cosine"], covered(model, qmodel))
    dtype = torch.bfloat16 if scheme == "bf16" else torch.float32
    return Trial(family, scheme, qmodel, report, run(qmodel, in_dtype(given(family), dtype)), cell)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.kwargs.items()}
    return Inputs((), cast, inputs.origin)


def matrices(model: nn.Module) -> int:
    """The parameters in matrices, convolutions and embeddings: all that have two dimensions."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def covered(model: nn.Module, qmodel: nn.Module) -> float:
    """How much of the matrices is no longer there in float32; not what a report says, a count."""
    left = sum(p.numel() for p in qmodel.parameters() if p.dim() > 1 and p.dtype == torch.float32)
    return 1 - left / matrices(model)


def left(trial: Trial) -> str:
    """The rows of the layers that are not quantized and have a matrix, the largest first."""
    rows = [r for r in trial.report.layers if r.scheme is None and len(r.shape) != 1]
    rows = sorted(rows, key=lambda row: -row.parameters)
    return "; ".join(f"{row.name} ({row.parameters}): {row.reason}" for row in rows[:9])


def check_report(trial: Trial) -> None:
    """Every parameter of the model is in exactly one row, and what is left has its reason."""
    rows = trial.report.layers
    assert sum(row.parameters for row in rows) == sum(
        p.numel() for p in trial.family.model().parameters()
    )
    assert all(row.scheme or row.reason for row in rows)


def dequantized(trial: Trial) -> nn.Module:
    """The float model, its weights replaced by what the codes stand for.

    It is torch's (or transformers') own modules that compute: an opened module's layers are views
    of the parameters of the closed one, which the weights are written through to. Only where
    weights were computed (weight norm) must the opened form run.
    """
    model = trial.family.model()
    form = opened_like(model, trial.qmodel)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    through = True
    for name, layer in trial.qmodel.named_modules(remove_duplicate=False):
        if isinstance(layer, QLayer):
            weight: Any = form.get_submodule(name).weight
            weight.data.copy_(layer.weight)
            through = through and weight.untyped_storage().data_ptr() in own
    return model if through else form


def check_reference(trial: Trial) -> None:
    """The outputs are those of torch's own layers with the weights that the codes stand for."""
    scheme = parse(trial.scheme)
    if scheme.input is not None:
        return  # torch has no layer that rounds its input; the bound on the cosine judges it
    if scheme.casts_model:
        model, inputs = trial.family.model().to(torch.bfloat16), given(trial.family)
        reference = run(model, in_dtype(inputs, torch.bfloat16))
        assert all(map(torch.equal, reference, trial.outputs))
        return
    same_outputs(run(dequantized(trial), given(trial.family)), trial.outputs)


def same_outputs(reference: list[Tensor], outputs: list[Tensor]) -> None:
    """Within the bound of a verification: only sums in another order may differ."""
    for want, have in zip(reference, outputs, strict=True):
        assert want.shape == have.shape
        stats = compare([want], [have])
        assert stats.max_abs <= BOUNDS.get(want.dtype, 0.0) * max(stats.max_ref, 1e-30)


def save(trial: Trial, folder: Path) -> Path:
    """The artifact, whose layers are verified one by one; whole models are run by ``fresh``."""
    path = folder / f"{trial.family.name} {trial.scheme}"
    return qkit.save(trial.qmodel, path, report=trial.report).path
