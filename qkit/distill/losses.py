"""What a student's outputs lose against a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.errors import InputError, UsageError


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over everything but the
    classes (dimension 1, or the last one of sequences ``[batch, length, classes]``) or over what
    ``mask`` (``[batch, length]``: tokens that are no padding) names.

    With ``T^2`` the gradients of soft and hard targets stay in proportion (Hinton et al. 2015,
    arXiv 1503.02531, section 2). Raises :class:`~qkit.errors.InputError` for other shapes.
    """
    check_alike(student, teacher)
    check_temperature(temperature)
    axis = 2 if student.dim() == 3 else 1
    log_p = (teacher.float() / temperature).log_softmax(axis)
    log_q = (student.float() / temperature).log_softmax(axis)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(axis)
    if mask is None:
        return temperature**2 * kl.mean()
    counted = mask.to(kl.dtype)
    return temperature**2 * (kl * counted).sum() / counted.sum().clamp(min=1)


def check_alike(student: Tensor, teacher: Tensor) -> None:
    """Raise :class:`~qkit.errors.InputError` unless both outputs are of one shape, with classes."""
    if student.shape != teacher.shape or student.dim() < 2:
        raise InputError(
            "teacher and student have different outputs, or none with classes",
            got=f"student {tuple(student.shape)}",
            wanted=f"teacher {tuple(teacher.shape)}",
        )


def check_weight(weight: float) -> None:
    """Raise :class:`~qkit.errors.UsageError` unless the weight of a teacher is a share."""
    if not 0 <= weight <= 1:
        raise UsageError("the weight of a teacher is 0 to 1", got=weight)


def check_temperature(temperature: float) -> None:
    """Raise :class:`~qkit.errors.UsageError` for a temperature that softens nothing."""
    if not 0 < temperature < float("inf"):
        raise UsageError("a temperature is more than 0, and finite", got=temperature)


def hard_and_soft(hard: Tensor | None, soft: Tensor, weight: float) -> Tensor:
    """``(1 - weight) hard + weight soft``; ``soft`` alone where there are no hard targets."""
    check_weight(weight)
    return soft if hard is None else torch.lerp(hard, soft.to(hard.dtype), weight)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((student - teacher)^2) / mean(teacher^2)``, of features of one shape: 1 for a student
    that answers zero (FitNets, Romero et al. 2015, arXiv 1412.6550, on a scale of its own)."""
    teacher = teacher.float()
    return F.mse_loss(student.float(), teacher) / teacher.square().mean().clamp(min=1e-12)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``|| q(student) - q(teacher) ||^2`` of each sample, the mean over samples, with ``q`` the map
    of where features are large: their squares summed over channels, normalised (Zagoruyko and
    Komodakis 2017, arXiv 1612.03928, section 3.1). The numbers of channels may differ."""
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean()


def attention_map(features: Tensor) -> Tensor:
    """``[n, places]`` of unit length, from ``[n, channels, ...]``, or ``[n, length, channels]``."""
    axis = 2 if features.dim() == 3 else 1
    return F.normalize(features.float().square().sum(axis).flatten(1), dim=1)
