"""A linear layer with a quantized weight."""

from __future__ import annotations

from torch import Tensor, nn

from qkit import ops
from qkit.nn.layer import QLayer
from qkit.spec import QSpec


class QLinear(QLayer):
    """``y = x @ W.T + b`` with ``W`` ``[out_features, in_features]`` quantized.

    ``x`` ``[..., in_features]`` is fp32, bf16, fp16 or fp64; ``y`` has its dtype.
    """

    float_class = nn.Linear

    def __init__(self, layer: nn.Linear, spec: QSpec) -> None:
        super().__init__(layer, spec)
        self.in_features = layer.in_features
        self.out_features = layer.out_features

    @staticmethod
    def input_vectors(layer: nn.Linear, x: Tensor) -> Tensor:
        """What the weight is multiplied with: ``[1, vectors, in_features]``."""
        return x.reshape(1, -1, layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        # Packed words do not tell how many columns they hold, so the operator cannot check this.
        # (Not torch._check: torch.compile takes no message that reads the module.)
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"QLinear takes {self.in_features} features, got {x.shape[-1]}")
        return ops.linear(
            x,
            self.stored_weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.bits,
            self.group,
        )
