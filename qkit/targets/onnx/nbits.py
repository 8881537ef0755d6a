"""Weights of 4 or 8 bits in blocks, for ONNX Runtime: layers that multiply them, and tables.

``torch.ops.qkit_onnx.matmul_nbits``         MatMulNBits
``torch.ops.qkit_onnx_tables.gather_nbits``  GatherBlockQuantized: rows are looked up as codes

What they compute in torch is the definition, with which the runtime must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from qkit.nn import QLayer, swap
from qkit.nn.embedding import QEmbedding
from qkit.nn.linear import QLinear
from qkit.numerics import choose_qparams, fake_quantize
from qkit.spec import Int, PerGroup, QSpec
from qkit.targets.onnx.domain import microsoft


@torch.library.custom_op("qkit_onnx::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    block: int,
    level: int,
) -> Tensor:
    """``x`` ``[..., columns]`` by the weight in ``codes`` (:func:`nbits_tensors`).

    ``level`` is the accuracy level of ONNX Runtime: with 4, each block of ``x`` is first rounded to
    int8 with a scale of its own.
    """
    if level == 4:
        acts = QSpec(Int(8, narrow=True), PerGroup(block), True, "dynamic")
        x = fake_quantize(x, choose_qparams(x, acts), acts)
    return linear(x, _decoded(codes, scales, zero_points, bits)[:, :columns], bias)


def _decoded(codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """The rows in ``codes`` (:func:`nbits_tensors`), the last block filled up."""
    values = from_blob(codes, bits).float()
    if zero_points is None:
        values = values - (1 << (bits - 1))
    else:
        values = values - from_blob(zero_points, bits)[:, : scales.shape[1], None]
    return (values * scales[..., None]).flatten(1)


@matmul_nbits.register_fake
def _(x: Tensor, codes: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qkit_onnx_tables::gather_nbits", mutates_args=())
def gather_nbits(
    ids: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int
) -> Tensor:
    """The rows ``ids`` of the table in ``codes``: ``[rows, columns * bits / 8]``, and the rest as
    :func:`nbits_tensors` has it."""
    flat, width = ids.reshape(-1), codes.shape[1] * 8 // bits
    chosen = codes.index_select(0, flat)
    blocks = pad(chosen, (0, scales.shape[1] * block * bits // 8 - chosen.shape[1]))
    zero = None if zero_points is None else zero_points.index_select(0, flat)
    shape = (len(flat), scales.shape[1], -1)
    rows = _decoded(blocks.reshape(shape), scales.index_select(0, flat), zero, bits)
    return rows[:, :width].reshape(*ids.shape, width)


@gather_nbits.register_fake
def _(
    ids: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int
) -> Tensor:
    return scales.new_empty((*ids.shape, codes.shape[1] * 8 // bits))


def to_blob(values: Tensor, bits: int) -> Tensor:
    """uint8 values along the last axis, two of 4 bits in a byte, the first in the low half."""
    if bits == 8:
        return values
    even = pad(values, (0, values.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def from_blob(blob: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`to_blob`, up to a value that filled the last byte."""
    if bits == 8:
        return blob
    return torch.stack([blob & 15, blob >> 4], -1).flatten(-2)


def nbits_tensors(layer: QLayer) -> dict[str, Tensor | None]:
    """What MatMulNBits takes of a layer whose scales are per group.

    ``codes`` uint8 ``[N, blocks, block * bits / 8]``, with ``2^(bits - 1)`` added and the last
    block filled with zeros; ``scales`` float ``[N, blocks]``; ``zero_points`` uint8
    ``[N, ceil(blocks * bits / 8)]`` with the same offset, or None where symmetric.
    """
    q = layer.qtensor()
    bits, block = layer.bits, layer.group
    middle = 1 << (bits - 1)
    codes = pad(q.codes, (0, -q.codes.shape[1] % block)).to(torch.int16) + middle
    blocks = codes.to(torch.uint8).unflatten(1, (-1, block))
    zero = q.qparams.zero_point
    if zero is not None:
        zero = to_blob((zero.to(torch.int16) + middle).to(torch.uint8), bits)
    return {
        "codes": to_blob(blocks, bits).contiguous(),
        "scales": q.qparams.scale.float(),
        "zero_points": zero,
    }


class NBitsLinear(nn.Module):
    """A linear layer that is written as MatMulNBits."""

    def __init__(self, layer: QLinear, level: int) -> None:
        super().__init__()
        self.columns, self.bits, self.block, self.level = (
            layer.in_features,
            layer.bits,
            layer.group,
            level,
        )
        for name, tensor in nbits_tensors(layer).items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[..., columns]`` -> ``[..., N]``."""
        return matmul_nbits(
            x,
            self.codes,
            self.scales,
            self.zero_points,
            self.bias,
            self.columns,
            self.bits,
            self.block,
            self.level,
        )


class NBitsTable(nn.Module):
    """A table whose rows are looked up by GatherBlockQuantized.

    Blocks are not filled up, unless a layer of the same weight (``tied``) holds them so: then both
    have the same tensors.
    """

    codes: Tensor

    def __init__(self, layer: QEmbedding, tied: NBitsLinear | None) -> None:
        super().__init__()
        self.columns, self.bits, self.block = layer.embedding_dim, layer.bits, layer.group
        tensors = nbits_tensors(layer) if tied is None else dict(tied.named_buffers())
        self.shared = tied is not None
        if not self.shared:
            codes = tensors["codes"]
            assert codes is not None
            kept = codes.flatten(1)[:, : -(-self.columns * self.bits // 8)]
            tensors["codes"] = kept.contiguous()
        for name in ("codes", "scales", "zero_points"):
            self.register_buffer(name, tensors.get(name))

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` -> ``[..., columns]``."""
        codes = self.codes.flatten(1) if self.shared else self.codes
        given = codes, self.scales, self.zero_points, self.bits, self.block
        rows: Tensor = gather_nbits(ids, *given)
        return rows if rows.shape[-1] == self.columns else rows[..., : self.columns]


def with_nbits(qmodel: nn.Module, level: int) -> nn.Module:
    """A copy of a quantized model whose layers are written as MatMulNBits, and tables as
    GatherBlockQuantized."""
    model = copy.deepcopy(qmodel)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLayer)}
    assert all(isinstance(m, QLinear | QEmbedding) for m in layers.values())
    linears = {n: NBitsLinear(m, level) for n, m in layers.items() if isinstance(m, QLinear)}
    codes = {id(layers[name].stored_weight): made for name, made in linears.items()}
    tables: dict[str, nn.Module] = {
        name: NBitsTable(layer, codes.get(id(layer.stored_weight)))
        for name, layer in layers.items()
        if isinstance(layer, QEmbedding)
    }
    return swap(model, tables | linears)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes the operators of this file."""

    def write_matmul_nbits(
        x: Any,
        codes: Any,
        scales: Any,
        zero_points: Any = None,
        bias: Any = None,
        columns: int = 0,
        bits: int = 0,
        block: int = 0,
        level: int = 0,
    ) -> Any:
        rows = int(codes.shape[0])
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        inputs = [x, codes, scales, zero_points, None, bias]
        return microsoft("MatMulNBits", inputs, **sizes, accuracy_level=level)[0]

    def write_gather_nbits(
        ids: Any, codes: Any, scales: Any, zero_points: Any = None, bits: int = 0, block: int = 0
    ) -> Any:
        axes = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block}
        return microsoft("GatherBlockQuantized", [codes, ids, scales, zero_points], **axes)[0]

    return {
        torch.ops.qkit_onnx.matmul_nbits.default: write_matmul_nbits,
        torch.ops.qkit_onnx_tables.gather_nbits.default: write_gather_nbits,
    }
