"""Error of one set of tensors against a reference. A metric is what its name says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import InputError

# By how much of the largest reference value sums of the same terms in another order may differ:
# 2^10 units in the last place of the activations' type for fp32 (long sums through many layers),
# and 2^3 for the 16-bit types (which are summed in fp32).
BOUNDS = {
    torch.float64: 2.0**-42,
    torch.float32: 2.0**-13,
    torch.float16: 2.0**-7,
    torch.bfloat16: 2.0**-4,
}

# By how much probabilities may miss their sum of 1: they may come from 16-bit floats.
SUM_SLACK = 1e-2


@dataclass(frozen=True)
class ErrorStats:
    """``sqnr_db`` 10 log10(sum r^2 / sum (r - x)^2); ``cosine`` of all values as one vector;
    ``max_abs`` the largest |r - x|; ``max_ref`` the largest |r|.

    ``sqnr_db`` is None where the error is exactly zero, and -inf where the reference is.
    """

    sqnr_db: float | None
    cosine: float
    max_abs: float
    max_ref: float

    def to_json(self) -> dict[str, float | None]:
        """The three figures of a report; None where a figure is infinite."""
        figures = {"sqnr_db": self.sqnr_db, "cosine": self.cosine, "max_abs": self.max_abs}
        return {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}


def compare(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> ErrorStats:
    """The error of ``outputs`` against ``reference``, two lists of tensors of equal shapes.

    Computed in float64; a complex number counts as two. NaN or infinity on one side only is an
    infinite error. Raises :class:`~qkit.errors.InputError` if the lists do not correspond.
    """
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in outputs]
    if shapes[0] != shapes[1]:
        raise InputError("outputs do not correspond", got=shapes[1], wanted=shapes[0])
    signal = noise = power = dot = max_abs = max_ref = 0.0
    for r, x in zip(reference, outputs, strict=True):
        if r.numel() == 0:
            continue
        r64, x64 = _float64(r), _float64(x)
        # Where both are the same infinity (a mask, say) or both NaN, there is no error.
        same = (r64 == x64) | (torch.isnan(r64) & torch.isnan(x64))
        error = torch.where(same, 0.0, (x64 - r64).abs().nan_to_num(math.inf, math.inf))
        r64, x64 = r64.nan_to_num(0.0, 0.0, 0.0), x64.nan_to_num(0.0, 0.0, 0.0)
        signal += float(r64.square().sum())
        power += float(x64.square().sum())
        noise += float(error.square().sum())
        dot += float((r64 * x64).sum())
        max_abs = max(max_abs, float(error.max()))
        max_ref = max(max_ref, float(r64.abs().max()))
    norm = math.sqrt(signal) * math.sqrt(power)
    cosine = dot / norm if norm else float(noise == 0)
    return ErrorStats(sqnr_db(signal, noise), cosine, max_abs, max_ref)


@dataclass(frozen=True)
class ClassStats:
    """``top1_agreement`` the share of rows with the largest value at the same place;
    ``kl_divergence`` the mean of sum p log(p / q) over the rows in nats, p of the reference; None
    where it is infinite."""

    top1_agreement: float
    kl_divergence: float | None


def compare_classes(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> ClassStats | None:
    """How the rows (the last dimension) of ``outputs`` differ as predictions of classes.

    Rows are logits, or, where all are not negative and sum to 1, probabilities. None where tensors
    do not look like either: floats ``[n, classes]`` or ``[n, length, classes]``, 2 classes or more.
    """
    if not reference or not all(map(_of_classes, [*reference, *outputs])):
        return None
    pairs = list(zip(map(_rows, reference), map(_rows, outputs), strict=True))
    if any(r.shape != x.shape for r, x in pairs):
        return None
    r64, x64 = (torch.cat(side) for side in zip(*pairs, strict=True))
    log_p, log_q = _log_probabilities(r64), _log_probabilities(x64)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    divergence = max(0.0, float(terms.sum(-1).mean()))
    agreement = float((r64.argmax(-1) == x64.argmax(-1)).double().mean())
    return ClassStats(agreement, divergence if math.isfinite(divergence) else None)


def _of_classes(t: Tensor) -> bool:
    return t.is_floating_point() and t.dim() in (2, 3) and t.shape[-1] >= 2 and t.numel() > 0


def _rows(t: Tensor) -> Tensor:
    return t.detach().double().flatten(0, -2)


def _log_probabilities(rows: Tensor) -> Tensor:
    sums = rows.sum(-1)
    given = bool((rows >= 0).all()) and bool(((sums - 1).abs() < SUM_SLACK).all())
    return (rows / sums[:, None]).log() if given else rows.log_softmax(-1)


def _float64(t: Tensor) -> Tensor:
    t = t.detach()
    return torch.view_as_real(t.resolve_conj()).double() if t.is_complex() else t.double()


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal to quantization-noise ratio in decibels, from two powers; None without noise."""
    if noise == 0:
        return None
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def tensor_sqnr_db(reference: Tensor, x: Tensor) -> float | None:
    """:func:`sqnr_db` of one tensor against its reference; cheap, for a report's rows."""
    error = x.float() - reference.float()
    signal = reference.float().square().sum(dtype=torch.float64)
    return sqnr_db(float(signal), float(error.square_().sum(dtype=torch.float64)))
