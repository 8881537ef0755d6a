"""A linear layer with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkit import ops
from qkit.nn.layer import CODES, QLayer
from qkit.ops import eager
from qkit.spec import Int, QSpec, Scheme


class QLinear(QLayer):
    """``y = x @ W.T + b`` with ``W`` ``[out_features, in_features]`` quantized.

    ``x`` ``[..., in_features]`` is fp32, bf16, fp16 or fp64; ``y`` has its dtype. With ``acts``,
    ``x`` is first rounded to integers: each row by its own range (dynamic), or all by one (static).
    """

    float_class = nn.Linear

    def __init__(self, layer: nn.Linear, spec: QSpec, acts: QSpec | None = None) -> None:
        super().__init__(layer, spec, acts)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self._kept = eager.Kept()
        self._op = "linear" if acts is None else f"linear_{acts.when}"
        if spec.by_table:
            self._op = "linear_codebook"

    @classmethod
    def lacks(cls, scheme: Scheme) -> str | None:
        """Why there is no such layer under ``scheme``; None where there is."""
        if scheme.input is None:
            return None
        if scheme.weight.by_table or not isinstance(scheme.input.format, Int):
            return "has no kernel with such activations"
        return None

    @staticmethod
    def input_vectors(layer: nn.Linear, x: Tensor) -> Tensor:
        """What the weight is multiplied with: ``[1, vectors, in_features]``."""
        return x.reshape(1, -1, layer.in_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name, for keyword calls)
        """``[..., in_features]`` -> ``[..., out_features]``."""
        # Packed words do not tell how many columns they hold, so the operator cannot check this.
        # (Not torch._check: torch.compile takes no message that reads the module.)
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"QLinear takes {self.in_features} features, got {input.shape[-1]}")
        return self._call(input)

    def _call(self, x: Tensor) -> Tensor:
        own, acts = self._buffers, self.acts
        weight = own[CODES if self.bits == 8 else "weight_packed"]
        scale, bias = own["weight_scale"], self._parameters["bias"]
        assert weight is not None
        assert scale is not None
        third = (
            own["weight_levels"] if self._op == "linear_codebook" else own.get("weight_zero_point")
        )
        given: tuple[Any, ...] = weight, scale, third, bias, self.bits, self.group
        if acts is not None:
            assert isinstance(acts.format, Int)
            if acts.when == "static":
                given += acts.format.bits, own["input_scale"], own.get("input_zero_point")
            else:
                full = acts.symmetric and not acts.format.narrow
                given += acts.format.bits, acts.symmetric, full
        if not torch.compiler.is_compiling():
            done = eager.linear(self._op, self._kept, x, *given)
            if done is not None:
                return done
        found: Tensor = getattr(ops, self._op)(x, *given)
        return found
