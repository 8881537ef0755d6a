"""Opened ``nn.Bilinear``: one linear layer over the products of its two inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qkit.nn.opened import Opened


class OpenBilinear(Opened):
    """``y[o] = sum_ij x1[i] W[o, i, j] x2[j] + b[o]`` with ``W`` as the ``[out, in1 * in2]`` layer.

    The products take ``in1 * in2`` values for each row of the input.
    """

    copied = ("in1_features", "in2_features", "out_features")
    in1_features: int
    in2_features: int

    def __init__(self, module: nn.Bilinear) -> None:
        super().__init__(module)
        self.add_linear("weight", module.weight.flatten(1), module.bias)

    @classmethod
    def tensors_of(cls, module: nn.Bilinear) -> set[str]:
        """The weight and the bias."""
        return {"weight", "bias"}

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """``[..., in1]`` and ``[..., in2]`` of the same leading dimensions -> ``[..., out]``."""
        wanted = (*input1.shape[:-1], self.in2_features)
        if input1.shape[-1] != self.in1_features or tuple(input2.shape) != wanted:
            raise RuntimeError(
                f"Bilinear: expected [..., {self.in1_features}] and [..., {self.in2_features}], "
                f"got {tuple(input1.shape)} and {tuple(input2.shape)}"
            )
        layer: Any = self._modules["weight"]
        return layer((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))
