"""Batch normalisation in several processes, by the statistics of all their samples together.

With ``N`` samples in all processes ``mean = sum x / N`` and ``var = sum (x - mean)^2 / N``, the
sums over the processes too, so that a step is that of one process with the whole batch. torch's
``SyncBatchNorm`` does this on GPUs alone, for modules that it replaces; here the function itself
is replaced while a step runs, whoever calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qkit.errors import InputError

_TORCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
# The functions that normalise a batch, and the names of what they take by position.
_NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    ),
    torch.batch_norm: _TORCH,
    torch.ops.aten.batch_norm.default: _TORCH,
}  # fmt: skip


class GlobalBatchNorm(TorchFunctionMode):
    """In this block, statistics that a batch normalisation takes from its input are those of the
    inputs of all processes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            given = dict(zip(_NORMS[func], args, strict=False)) | kwargs
            if given.get("training"):
                return normalised(given)
        return func(*args, **kwargs)


def normalised(given: dict[str, Any]) -> Tensor:
    """What a batch normalisation in training gives; ``given`` are its arguments by name.

    Raises :class:`~qkit.errors.InputError` for one value in each channel, which varies in nothing.
    """
    x: Tensor = given["input"]
    wide = x if x.dtype == torch.float64 else x.float()
    axes, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    count = wide.new_tensor([x.numel() // x.shape[1]])
    sums = _Summed.apply(torch.cat([wide.sum(axes), count]))
    total = float(sums.detach()[-1])
    if total < 2:
        raise InputError(
            "a batch normalisation has one value in each channel, and nothing to learn from",
            got=tuple(x.shape),
            fix="a larger batch",
        )
    mean = sums[:-1] / total
    centred = wide - mean.view(shape)
    variance = _Summed.apply(centred.square().sum(axes)) / total
    _move(given, "running_mean", mean)
    _move(given, "running_var", variance * (total / (total - 1)))
    y = centred * torch.rsqrt(variance + given.get("eps", 1e-5)).view(shape)
    if given.get("weight") is not None:
        y = y * given["weight"].view(shape)
    if given.get("bias") is not None:
        y = y + given["bias"].view(shape)
    return y.to(x.dtype)


@torch.no_grad()
def _move(given: dict[str, Any], name: str, value: Tensor) -> None:
    running: Tensor | None = given.get(name)
    if running is not None:
        running.lerp_(value.to(running.dtype), given.get("momentum", 0.1))


class _Summed(torch.autograd.Function):
    """The sum over all processes; each one's part in it has the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total
