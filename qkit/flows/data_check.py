"""What is suspicious about calibration data: noise, too few samples, another normalisation.

Each is a common reason for bad int8, and none is an error: a remark says what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkit.flows.data import tensors_of
from qkit.flows.evaluate import eval_mode
from qkit.models import Inputs, leading, run

# Fewer samples than this seldom show what an activation reaches; 100 to 500 are usual.
FEW = 32
# How far a statistic of noise may be from what is expected of noise, in its standard deviations.
SIGMAS = 4.0
# Between neighbours in pictures the correlation is 0.8 to 0.99, in speech 0.5 and more.
RELATED = 0.1
# Values that a judgement needs.
ENOUGH = 1024
# A batch-norm's inputs may differ from its statistics by half a deviation, or double the variance.
MAX_SHIFT, MAX_RATIO = 0.5, 2.0


def suspicions(model: nn.Module, inputs: Inputs, samples: int) -> list[str]:
    """Remarks about data, of which there are ``samples`` and ``inputs`` are the first ones."""
    found = []
    if samples < FEW:
        found.append(
            f"calibration: {samples} samples are few to learn ranges from: take 100 to 500"
        )
    for name, tensor in tensors_of(inputs).items():
        where = f"input {name}"
        if len(tensor) > 1 and tensor.dim() and bool((tensor == tensor[:1]).all()):
            found.append(f"calibration: all samples of {where} are the same")
        elif looks_random(tensor):
            found.append(
                f"calibration: {where} looks like random numbers, not like real data: neighbours "
                "have nothing to do with each other, and ranges learnt from it are those of noise"
            )
    if told := _normalisation(model, inputs):
        found.append(told)
    return found


def looks_random(x: Tensor) -> bool:
    """Whether the values of ``x`` ``[samples, ...]`` are unrelated, as drawn one by one.

    Floats with a length or an area: neighbours along no dimension are correlated. Floats per
    feature: the features are uncorrelated and distributed alike, neither of which real ones are.
    Integers: all numbers are equally frequent.
    """
    if x.numel() < ENOUGH or x.dim() < 2:
        return False
    if not x.is_floating_point():
        return x.dtype != torch.bool and _uniform(x.flatten())
    x = x.float()
    if x.dim() == 2:
        return len(x) >= 16 and _unrelated_features(x)
    return all(abs(r) < max(RELATED, SIGMAS / math.sqrt(n)) for r, n in _neighbours(x))


def _neighbours(x: Tensor) -> Iterator[tuple[float, int]]:
    """The correlation of neighbours along each dimension behind the samples, and of how many.

    The means of channels are taken away for it: they would correlate all.
    """
    rest = tuple(d for d in range(x.dim()) if d != 1)
    x = x - (x.mean(rest, keepdim=True) if x.dim() > 3 else x.mean())
    power = float(x.square().mean())
    for dim in range(2 if x.dim() > 3 else 1, x.dim()):
        if x.shape[dim] > 1 and power > 0:
            a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
            yield float((a * b).mean()) / power, a.numel()


def _unrelated_features(x: Tensor) -> bool:
    """Correlations of ``n`` samples of independent features have the mean square ``1 / (n - 1)``,
    and the means of features of one distribution the variance ``var / n``."""
    n, features = x.shape
    spread = x.std(0)
    if features < 4 or bool((spread == 0).any()):
        return False
    scaled = (x - x.mean(0)) / spread
    square = (scaled.T @ scaled / (n - 1)).square()
    pairs = features * (features - 1)
    excess = float((square.sum() - square.diagonal().sum()) / pairs) * (n - 1) - 1
    means = float(x.mean(0).var() * n / x.var(0).mean()) - 1
    # Of a sum of m squares of normal numbers, the relative standard deviation is sqrt(2 / m).
    unrelated = abs(excess) < SIGMAS * math.sqrt(2 / (pairs / 2))
    return unrelated and abs(means) < SIGMAS * math.sqrt(2 / (features - 1))


def _uniform(x: Tensor) -> bool:
    """Whether integers are as evenly spread over their range as if they were drawn from it.

    By the number of distinct ones: words of a text, levels of a picture repeat more.
    """
    least, greatest = int(x.min()), int(x.max())
    size, n = greatest - least + 1, x.numel()
    if size < 16:
        return False
    counts = torch.unique(x, return_counts=True)[1].double()
    # Pearson's statistic, over all cells of the range: size - 1 on average for even chances.
    expected = n / size
    statistic = float((counts - expected).square().sum() + (size - len(counts)) * expected**2)
    statistic /= expected
    return statistic - (size - 1) < SIGMAS * math.sqrt(2 * (size - 1))


def _normalisation(model: nn.Module, inputs: Inputs) -> str | None:
    """How the inputs of the first batch-norm differ from those that it was trained on."""
    norms = {m: n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    seen: list[tuple[_BatchNorm, Tensor]] = []

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        if not seen and args:
            seen.append((module, args[0].detach()))
            raise _Enough

    handles = [
        m.register_forward_pre_hook(note)
        for m in norms
        if m.running_mean is not None  # type: ignore[arg-type]
    ]
    try:
        with eval_mode(model), suppress(Exception):
            run(model, inputs)  # what is wrong with it is told elsewhere
    finally:
        for handle in handles:
            handle.remove()
    if not seen or leading(inputs) == 0:
        return None
    module, x = seen[0]
    return _shifted(norms[module], module, x)


class _Enough(Exception):
    """The first batch-norm was reached; the rest of the model need not run."""


def _shifted(name: str, norm: _BatchNorm, x: Tensor) -> str | None:
    rows = x.movedim(1, 0).flatten(1) if x.dim() > 1 else x[None]
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    if rows.shape[1] < FEW or bool(((mean == 0) & (var == 1)).all()):  # never trained
        return None
    shift = float(((rows.mean(1) - mean).abs() / (var + 1e-12).sqrt()).median())
    ratio = float((rows.var(1) / (var + 1e-12)).median())
    if shift <= MAX_SHIFT and 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        return None
    return (
        f"calibration: the data are not normalised as in training, it seems: at the first "
        f"batch-norm, {name}, the variance is {ratio:.3g} times what its running statistics say "
        f"and the mean is off by {shift:.3g} standard deviations (median of the channels)"
    )
