"""Opened ``nn.MultiheadAttention``: its projections are layers that are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qkit.nn.opened import Opened


class OpenAttention(Opened):
    """``nn.MultiheadAttention`` with ``in_proj_weight`` and ``out_proj`` as layers.

    Where keys or values have another size than queries, ``q_proj_weight``, ``k_proj_weight`` and
    ``v_proj_weight`` are layers, and ``in_proj_bias`` stays a parameter. The fused projection gives
    queries, keys and values of every tensor it is called with, so cross-attention computes it for
    the queries and again for the keys.
    """

    copied = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first",
              "add_zero_attn")  # fmt: skip
    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        # Also what torch's transformer layers look at, before they take a fused path or not.
        self._qkv_same_embed_dim = module._qkv_same_embed_dim
        bias = module.in_proj_bias
        if self._qkv_same_embed_dim:
            self.add_linear("in_proj_weight", module.in_proj_weight, bias)
            bias = None
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.add_linear(name, getattr(module, name), None)
        self.register_parameter("in_proj_bias", bias)
        self.register_parameter("bias_k", module.bias_k)
        self.register_parameter("bias_v", module.bias_v)
        self.add_linear("out_proj", module.out_proj.weight, module.out_proj.bias)

    @classmethod
    def tensors_of(cls, module: Any) -> set[str]:
        """The names of the weights, of the biases and of a plain ``out_proj``."""
        known = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
        if type(module.out_proj) in (NonDynamicallyQuantizableLinear, nn.Linear):
            known.add("out_proj")
        return known | {"in_proj_bias", "bias_k", "bias_v"}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the original returns: ``[B, L, embed_dim]``, and the weights or None.

        As there, ``is_causal`` is a hint about ``attn_mask``, and lets it be left unread.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal is a hint, attn_mask is needed too")
        batched = query.dim() == 3
        if not query.dim() == key.dim() == value.dim() in (2, 3):
            raise RuntimeError("MultiheadAttention: query, key and value are 2-D or 3-D alike")
        q, k, v = self._project(query, key, value, batched)
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        if added:
            k, v = (self._longer(*pair) for pair in ((k, self.bias_k), (v, self.bias_v)))
        causal = is_causal and key_padding_mask is None and not need_weights
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        shape = (q.shape[0], self.num_heads, q.shape[1], k.shape[1] - added)
        mask = _mask(None if causal else attn_mask, key_padding_mask, shape, added, q.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        layers: dict[str, Any] = dict(self._modules)
        output = layers["out_proj"](mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        """Queries, keys and values, ``[B, length, embed_dim]``."""
        layers: dict[str, Any] = dict(self._modules)

        def batch_first(x: Tensor) -> Tensor:
            if not batched:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        given = (query, key, value)
        if self._qkv_same_embed_dim:
            project, distinct = layers["in_proj_weight"], {id(x): x for x in given}
            fused = {i: project(batch_first(x)).chunk(3, -1) for i, x in distinct.items()}
            return [fused[id(x)][part] for part, x in enumerate(given)]
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        parts = [layers[name](batch_first(x)) for name, x in zip(names, given, strict=True)]
        if self.in_proj_bias is None:
            return parts
        return [p + b for p, b in zip(parts, self.in_proj_bias.chunk(3), strict=True)]

    def _longer(self, x: Tensor, bias: Any) -> Tensor:
        """``x`` with the learnt key or value behind it, and zeros, where the options say so."""
        shape = (x.shape[0], 1, x.shape[2])
        more = [] if bias is None else [bias.expand(shape)]
        more += [x.new_zeros(shape)] if self.add_zero_attn else []
        return torch.cat([x, *more], 1)


def _mask(
    attention: Tensor | None,
    padding: Tensor | None,
    shape: tuple[int, int, int, int],
    added: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to the scores ``[B, heads, L, S + added]``; None for nothing.

    ``attention`` is ``[L, S]`` or ``[B * heads, L, S]``, ``padding`` ``[B, S]``; True forbids.
    """
    batch, heads, length, source = shape
    parts = []
    if attention is not None:
        wanted = (length, source) if attention.dim() == 2 else (batch * heads, length, source)
        if attention.shape != wanted:
            raise RuntimeError(
                f"MultiheadAttention: expected attn_mask {wanted}, got {tuple(attention.shape)}"
            )
        whole = attention.dim() == 2
        parts.append(attention[None, None] if whole else attention.unflatten(0, (batch, heads)))
    if padding is not None:
        if padding.shape != (batch, source):
            raise RuntimeError(
                f"MultiheadAttention: expected key_padding_mask {(batch, source)}, "
                f"got {tuple(padding.shape)}"
            )
        parts.append(padding[:, None, None])
    floats = [F.pad(_float(part, dtype), (0, added)) for part in parts]
    return sum(floats[1:], floats[0]) if floats else None


def _float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"MultiheadAttention: masks are bool or float, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
