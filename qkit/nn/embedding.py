"""Lookup tables with quantized rows: only the rows that are looked up are dequantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit import ops
from qkit.nn.layer import QLayer
from qkit.ops import eager
from qkit.packing.store import matrix_shape
from qkit.spec import QSpec, Scheme


class QTable(QLayer):
    """Base of the tables: weights ``[num_embeddings, embedding_dim]`` of which rows are looked up.

    What torch's layers say about gradients of the weight (``sparse``, ``scale_grad_by_freq``,
    ``padding_idx``) has no meaning here, because the quantized weight has none; the numbers of
    ``padding_idx`` are still where the float layer had them.
    """

    parameter_names = ("weight",)
    has_vectors = False  # a row is looked up, not multiplied

    def __init__(self, layer: Any, spec: QSpec, acts: QSpec | None = None) -> None:
        super().__init__(layer, spec, acts)
        self.num_embeddings = layer.num_embeddings
        self.embedding_dim = layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self._kept = eager.Kept()

    @classmethod
    def lacks(cls, scheme: Scheme) -> str | None:
        """Why there is no such layer under ``scheme``; None where there is."""
        return None if scheme.input is None else "has indices as its input, which are exact"

    @classmethod
    def part_of(cls, scheme: Scheme) -> Scheme:
        """The weights of ``scheme``: there are no activations to quantize."""
        return Scheme(scheme.weight)

    @classmethod
    def unfit(cls, layer: Any) -> str | None:
        """``max_norm`` changes the weight itself at each lookup."""
        if layer.max_norm is not None:
            return "max_norm rescales its float weight in place at each lookup"
        return None

    def look_up(self, indices: Tensor) -> Tensor:
        """``[...]`` of 0 to ``num_embeddings - 1`` -> ``[..., embedding_dim]``, dequantized."""
        columns = matrix_shape(self.weight_size)[1]
        how = self.bits, self.group, columns, self.weight_dtype
        if self.spec.by_table:
            flat = indices.reshape(-1)
            codes, scale = self.stored_weight, self.weight_scale
            scale = scale if len(scale) == 1 else scale.index_select(0, flat)
            rows = ops.dequantize_codebook(
                codes.index_select(0, flat), scale, self.weight_levels, *how
            )
            return rows.reshape(*indices.shape, columns)
        given = indices, self.stored_weight, self.weight_scale, self.weight_zero_point, *how
        if not torch.compiler.is_compiling():
            done = eager.embedding(self._kept, *given)
            if done is not None:
                return done
        return ops.embedding(*given)


class QEmbedding(QTable):
    """``nn.Embedding`` with its weight quantized."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name, for keyword calls)
        """``[...]`` -> ``[..., embedding_dim]`` in the dtype of the float weight."""
        return self.look_up(input)


class QEmbeddingBag(QTable):
    """``nn.EmbeddingBag`` with its weight quantized: sums, means or maxima of rows."""

    float_class = nn.EmbeddingBag

    def __init__(self, layer: Any, spec: QSpec, acts: QSpec | None = None) -> None:
        super().__init__(layer, spec, acts)
        self.mode = layer.mode
        self.include_last_offset = layer.include_last_offset

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's name, for keyword calls)
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """``[bags, length]``, or ``[N]`` with the ``offsets`` of the bags, -> ``[bags, dim]``.

        torch's own operator, on a table of the rows that are looked up, in their order. Entries
        that are ``padding_idx`` name a row of zeros before them, which is the padding there.
        """
        if input.is_nested:
            raise RuntimeError("QEmbeddingBag takes no nested tensors: give offsets")
        rows, padding = self.look_up(input.reshape(-1)), None
        places = torch.arange(input.numel(), dtype=input.dtype, device=input.device)
        places = places.reshape(input.shape)
        if self.padding_idx is not None:
            padding = 0
            places = torch.where(input == self.padding_idx, 0, places + 1)
            rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return F.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
