"""Opened mixture-of-experts modules: one layer for each expert in place of 3-D parameters.

transformers (5.x) marks its expert modules with ``use_experts_implementation``, which says how
their parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` are laid out: ``[E, out, in]``,
or ``[E, in, out]`` where ``is_transposed``, and maybe ``..._bias`` ``[E, out]``. All of them
compute, for each token and each of its experts,

    weight * down(gate(up(token)))      and their sum

with a ``gate`` of the class. Nothing is imported from transformers: a module tells all of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkit.nn.opened import Opened, linear

_MARKS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` is one of the expert modules of transformers."""
    own = vars(module)
    marked = all(mark in own for mark in _MARKS) and not own.get("_is_expert_parallel")
    return marked and type(module).__module__.startswith("transformers.models.")


class OpenExperts(Opened):
    """An expert module whose ``gate_up_proj`` and ``down_proj`` are lists of ``E`` layers.

    The other attributes and children (the activation) are those of the original.
    """

    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.take_attributes(module)
        for name, child in module._modules.items():
            self.add_module(name, child)
        self.up_name = "gate_up_proj" if module.has_gate else "up_proj"
        self.gate = type(module)._apply_gate  # a plain function: it is given this module
        for name in (self.up_name, "down_proj"):
            weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
            layers = []
            for expert in range(module.num_experts):
                weight = weights[expert].T if module.is_transposed else weights[expert]
                layers.append(linear(weight, None if biases is None else biases[expert]))
            self.add_module(name, nn.ModuleList(layers).train(self.training))

    @classmethod
    def tensors_of(cls, module: Any) -> set[str]:
        """The names of the weights and biases, and of the children, which are kept."""
        names = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
        whole = all(
            isinstance(weight := module._parameters.get(name), Tensor)
            and weight.dim() == 3
            and len(weight) == module.num_experts
            for name in names
        )
        if not whole:
            return {*module._modules}
        return names | {f"{name}_bias" for name in names if module.has_bias} | {*module._modules}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[N, hidden]``, the ``K`` experts of each token and their weights -> ``[N, hidden]``.

        An index of ``num_experts`` stands for no expert.
        """
        layers: dict[str, Any] = dict(self._modules)
        count, width = top_k_index.shape[-1], hidden_states.shape[-1]
        experts, scales = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        dtype = torch.promote_types(hidden_states.dtype, scales.dtype)
        parts = hidden_states.new_zeros(len(experts), width, dtype=dtype)
        for expert in range(self.num_experts):
            (chosen,) = torch.where(experts == expert)
            # An empty product is skipped, but not where a graph for all inputs is recorded.
            if not torch.compiler.is_compiling() and len(chosen) == 0:
                continue
            x = layers[self.up_name][expert](hidden_states[chosen // count])
            x = self.gate(self, x) if self.has_gate else layers["act_fn"](x)
            x = layers["down_proj"][expert](x)
            if self.has_post_expert_norm:
                x = layers["post_expert_norm"](x)
            parts[chosen] = (x * scales[chosen]).to(dtype)
        return parts.view(-1, count, width).sum(1).to(hidden_states.dtype)
