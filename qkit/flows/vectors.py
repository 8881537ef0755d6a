"""What the weight of an operator in a captured graph is multiplied with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.nn import QUANTIZED


def groups_of(node: fx.Node) -> int:
    """The groups of a convolution; 1 of other operators."""
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    return int(groups)


def vectors(args: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """What a weight of ``shape`` is multiplied with, of the arguments of its operator:
    ``[groups, vectors, columns]``."""
    x: Tensor = args[0]
    n = len(shape) - 2
    if n == 0:
        return x.reshape(1, -1, x.shape[-1])
    given: list[Any] = list(args[3:7])
    stride, padding, dilation, groups = given + [1, 0, 1, 1][len(given) :]
    stride, dilation = (_each(v, n) for v in (stride, dilation))
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(shape[2:], dilation, strict=True)]
        around = [(total // 2, total - total // 2) for total in whole]
    else:
        around = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    layer = SimpleNamespace(
        kernel_size=tuple(shape[2:]),
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding_mode="zeros",
        _reversed_padding_repeated_twice=[p for pair in around[::-1] for p in pair],
    )
    convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n]
    found: Tensor = QUANTIZED[convolution].input_vectors(layer, x)
    return found


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A size for each dimension of space."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values
