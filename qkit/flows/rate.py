"""The rate-distortion view: how many bits a scheme spends, and how many it would have to.

No code of any kind can describe Gaussian values of power ``P`` with mean squared error ``D`` in
fewer than ``R(D) = 1/2 log2(P / D)`` bits each (Cover & Thomas, Elements of Information Theory,
theorem 10.3.2). What a scheme spends above that is what a better one could still win; real weights
with heavy tails may even be below the bound, because a Gaussian is the hardest source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkit.algorithms import rtn
from qkit.errors import InputError, UsageError
from qkit.models import load as load_model
from qkit.nn import QUANTIZED, survey, tree
from qkit.numerics import cast, dequantize
from qkit.packing.entropy import alphabet
from qkit.report import tensor_sqnr_db
from qkit.spec import PRESETS, Float, QSpec, Scheme, parse
from qkit.targets.artifact import is_artifact

DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True)
class RatePoint:
    """One weight under one scheme; all rates in bits per weight, scales included.

    ``stored`` is what the packed layout takes; ``coded`` what an ideal entropy coder would make of
    the codes (order 0: sum of -p log2 p; a cast's are its bit patterns); ``bound`` is R(D) at this
    SQNR, and None where there is no error. ``gap`` is ``coded - bound``.
    """

    name: str
    scheme: str
    values: int
    stored: float
    coded: float
    sqnr_db: float | None
    bound: float | None
    gap: float | None

    def to_json(self) -> dict[str, Any]:
        """This point as plain data."""
        return asdict(self)


def entropy_bits(codes: Tensor) -> float:
    """The order-0 entropy of codes of one or two bytes in bits per value; 0 for none."""
    symbols = codes.contiguous().flatten()
    if symbols.element_size() == 1:
        return alphabet.entropy(alphabet.counts(symbols.view(torch.uint8).numpy()))
    return alphabet.entropy(np.bincount(symbols.view(torch.int16).numpy().view(np.uint16)))


def rate_point(weight: Tensor, spec: QSpec, *, name: str = "weight", scheme: str = "") -> RatePoint:
    """The rates and the error of ``weight`` ``[rows, columns]`` rounded to nearest by ``spec``."""
    if spec.is_cast:
        assert isinstance(spec.format, Float)
        decoded, _ = cast(weight, spec.format, name=name)
        stored, coded = float(spec.format.bits), entropy_bits(decoded)
    else:
        q = rtn(weight, spec, name=name)
        decoded, stored = dequantize(q), q.bits_per_weight
        coded = entropy_bits(q.codes) + stored - q.spec.format.bits
    sqnr = tensor_sqnr_db(weight, decoded)
    bound = None if sqnr is None else max(0.0, sqnr / DB_PER_BIT)
    gap = None if bound is None else coded - bound
    return RatePoint(name, scheme, weight.numel(), stored, coded, sqnr, bound, gap)


def default_schemes() -> list[str]:
    """The weight-only presets, one for each weight spec."""
    found: dict[QSpec, str] = {}
    for name in PRESETS:
        scheme = parse(name)
        if scheme.weight_only:
            found.setdefault(scheme.weight, name)
    return list(found.values())


def rate_distortion(
    model: nn.Module | str | Path,
    schemes: Sequence[str | Scheme] = (),
    *,
    trust_pickle: bool = False,
) -> list[RatePoint]:
    """A :class:`RatePoint` for each quantizable weight of a float model under each scheme.

    Raises :class:`~qkit.errors.UsageError` for an artifact (its float weights are gone), and
    :class:`~qkit.errors.RequestError` for a cast to a type in which a weight overflows.
    """
    chosen = [parse(s) if isinstance(s, str) else s for s in schemes or default_schemes()]
    points = []
    for entry in survey(_open(model, trust_pickle)):
        if entry.reason is not None or entry.tied_to is not None:
            continue
        module: Any = entry.module
        weight = QUANTIZED[type(module)].rows(module).detach().flatten(1)
        name = f"{entry.name}.weight" if entry.name else "weight"
        points += [rate_point(weight, s.weight, name=name, scheme=s.name) for s in chosen]
    if not points:
        raise InputError("the model has no weight that could be quantized")
    return points


def _open(model: nn.Module | str | Path, trust_pickle: bool) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if is_artifact(model):
        raise UsageError(
            "an artifact no longer has its float weights",
            where=str(model),
            fix="--rd on the model that was quantized",
        )
    loaded = load_model(model, trust_pickle=trust_pickle)
    return loaded.model or tree(loaded.state_dict or {}, loaded.layer_kinds)
