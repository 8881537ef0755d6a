"""What a student's outputs lose against a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.errors import InputError, UsageError


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over everything but the
    classes (dimension 1, or the last one of sequences ``[batch, length, classes]``).

    With ``T^2`` the gradients of soft and hard targets stay in proportion (Hinton et al. 2015,
    arXiv 1503.02531, section 2). Raises :class:`~qkit.errors.InputError` for other shapes.
    """
    check_alike(student, teacher)
    if not 0 < temperature < float("inf"):
        raise UsageError("a temperature is more than 0, and finite", got=temperature)
    axis = 2 if student.dim() == 3 else 1
    log_p = (teacher.float() / temperature).log_softmax(axis)
    log_q = (student.float() / temperature).log_softmax(axis)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(axis)
    return temperature**2 * kl.mean()


def check_alike(student: Tensor, teacher: Tensor) -> None:
    """Raise :class:`~qkit.errors.InputError` unless both outputs are of one shape, with classes."""
    if student.shape != teacher.shape or student.dim() < 2:
        raise InputError(
            "teacher and student have different outputs, or none with classes",
            got=f"student {tuple(student.shape)}",
            wanted=f"teacher {tuple(teacher.shape)}",
        )


def hard_and_soft(hard: Tensor | None, soft: Tensor, weight: float) -> Tensor:
    """``(1 - weight) hard + weight soft``; ``soft`` alone where there are no hard targets."""
    if not 0 <= weight <= 1:
        raise UsageError("the weight of a teacher is 0 to 1", got=weight)
    return soft if hard is None else torch.lerp(hard, soft, weight)
