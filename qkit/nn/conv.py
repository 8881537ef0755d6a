"""Convolutions with a quantized weight: of one to three dimensions, forward and transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit import ops
from qkit.nn.layer import CODES, QLayer
from qkit.ops import eager
from qkit.ops.reference import work_dtype
from qkit.spec import QSpec


class QConv(QLayer):
    """Base of the convolutions. Input ``[B, C, *size]`` or ``[C, *size]`` in any float dtype.

    An output channel's weights are one row of ``in / groups * prod(kernel)`` values, on which the
    scales of a per-channel scheme and the groups of a per-group scheme lie. Narrow floats and
    codebooks have no operator of their own here: they are dequantized, and torch's is called.
    """

    dimensions: ClassVar[int]
    transposed: ClassVar[bool] = False
    # Keep the dequantized weight between calls: the speed of the float layer for its memory.
    runtime_cache: bool = False

    def __init__(self, layer: Any, spec: QSpec, acts: QSpec | None = None) -> None:
        super().__init__(layer, spec, acts)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.output_padding = layer.output_padding
        self.groups = layer.groups
        self.padding_mode = layer.padding_mode
        # Before, after, of the last dimension first: 'same' may need one more on one side.
        self._pad = pad = tuple(layer._reversed_padding_repeated_twice)
        # What torch's operators pad themselves, the first dimension first; None: something else.
        plain = layer.padding_mode == "zeros" and pad[::2] == pad[1::2]
        self._before = list(pad[::-2]) if plain else None
        self._none = [0] * self.dimensions
        self._kept, self._floats = eager.Kept(), eager.Kept()

    @staticmethod
    def input_vectors(layer: Any, x: Tensor) -> Tensor:
        """What the weight is multiplied with: ``[groups, vectors, in / groups * prod(kernel)]``."""
        n = len(layer.kernel_size)
        x = x.reshape(-1, *x.shape[-1 - n :])
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=_mode(layer))
        return _vectors(_patches(x, layer.kernel_size, layer.stride, layer.dilation), layer.groups)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name, for keyword calls)
        """``[B, C, *size]`` -> ``[B, out, *size']`` (or both without ``B``)."""
        self._check(x := input)
        if x.dim() == self.dimensions + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if self._before is None:
            return self._convolve(F.pad(x, self._pad, mode=_mode(self)), self._none)
        return self._convolve(x, self._before)

    def _check(self, x: Tensor) -> None:
        n = self.dimensions
        if x.dim() not in (n + 1, n + 2) or x.shape[-1 - n] != self.in_channels:
            raise RuntimeError(
                f"{type(self).__name__} takes {self.in_channels} channels and {n} dimensions of "
                f"space, got shape {tuple(x.shape)}"
            )

    def _convolve(
        self, x: Tensor, padding: list[int], output_padding: Sequence[int] | None = None
    ) -> Tensor:
        own = self._buffers
        if self.spec.by_table or (self.runtime_cache and not torch.compiler.is_compiling()):
            return self._by_float_weight(x, padding, output_padding or self._none)
        given: tuple[Any, ...] = (
            x,
            own[CODES if self.bits == 8 else "weight_packed"],
            own["weight_scale"],
            own.get("weight_zero_point"),
            self._parameters["bias"],
            *(self.bits, self.group, self.kernel_size),
            *(self.stride, padding, self.dilation, self.groups),
            *(self.transposed, output_padding or self._none),
        )
        if not torch.compiler.is_compiling():
            done = eager.convolve(self._kept, *given)
            if done is not None:
                return done
        return ops.convolution(*given)

    def _by_float_weight(
        self, x: Tensor, padding: list[int], output_padding: Sequence[int]
    ) -> Tensor:
        """What the operator computes, by the float weight, which may be kept."""
        own, work = self._buffers, work_dtype(x)
        bias: Tensor | None = self._parameters["bias"]
        if self.runtime_cache and not torch.compiler.is_compiling():
            names = CODES if self.bits == 8 else "weight_packed", "weight_scale"
            stored = tuple(own.get(n) for n in (*names, "weight_zero_point", "weight_levels"))
            weight = eager.kept_floats(self._floats, stored, work, lambda: self.values(work))
        else:
            weight = self.values(work)
        narrow = x.dtype is not work
        if bias is not None and bias.dtype is not work:
            bias = bias.to(work)
        y = torch.convolution(
            x.to(work) if narrow else x,
            weight,
            bias,
            *(self.stride, padding, self.dilation, self.transposed),
            *(output_padding, self.groups),
        )
        return y.to(x.dtype) if narrow else y


def keep_floats(model: nn.Module) -> int:
    """Let every quantized convolution of ``model`` keep its weight in float between calls.

    Returns the bytes that this takes in fp32, once the layers have run. Other layers have kernels
    that need no floats.
    """
    layers = [module for module in model.modules() if isinstance(module, QConv)]
    for layer in layers:
        layer.runtime_cache = True
    return sum(4 * math.prod(layer.weight_size) for layer in layers)


class QConvTranspose(QConv):
    """Base of the transposed convolutions, whose weight ``[in, out / groups, *kernel]`` is stored
    turned (:func:`qkit.packing.store.turn`), so that a row is an output channel here too."""

    transposed = True

    @staticmethod
    def turned(layer: Any) -> int:
        """The groups by which the weight is turned."""
        return layer.groups

    @staticmethod
    def input_vectors(layer: Any, x: Tensor) -> Tensor:
        """What the turned weight is multiplied with, as in :meth:`QConv.input_vectors`.

        The layer is a forward convolution of ``x`` with ``stride - 1`` zeros between its values,
        with the kernel backwards. (What ``output_size`` adds at a call is not known here.)
        """
        n = len(layer.kernel_size)
        x = x.reshape(-1, *x.shape[-1 - n :])
        size = [(length - 1) * s + 1 for length, s in zip(x.shape[2:], layer.stride, strict=True)]
        sparse = x.new_zeros(*x.shape[:2], *size)
        spread = sparse
        for dim, s in enumerate(layer.stride, 2):
            spread = spread.unfold(dim, 1, s).squeeze(-1)  # a view of every s-th value
        spread.copy_(x)
        pad: list[int] = []  # before, after, of the last dimension first
        geometry = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
        for (k, d, p), more in zip([*geometry][::-1], layer.output_padding[::-1], strict=True):
            pad += [d * (k - 1) - p, d * (k - 1) - p + more]
        patches = _patches(F.pad(sparse, pad), layer.kernel_size, (1,) * n, layer.dilation)
        return _vectors(patches.flip(list(range(-n, 0))), layer.groups)

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's name, for keyword calls)
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """``[B, C, *size]`` -> ``[B, out, *size']`` (or both without ``B``), of ``output_size``."""
        self._check(x := input)
        if x.dim() == self.dimensions + 1:
            return self.forward(x.unsqueeze(0), output_size).squeeze(0)
        more = self.output_padding
        if output_size is not None:
            more = self._to_reach(tuple(output_size)[-self.dimensions :], x.shape[2:])
        assert self._before is not None
        return self._convolve(x, self._before, more)

    def _to_reach(self, wanted: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that gives outputs of the size ``wanted`` for inputs of ``size``."""
        if len(wanted) != self.dimensions:
            raise ValueError(f"output_size has {self.dimensions} dimensions, got {wanted}")
        geometry = zip(
            size, self.stride, self.padding, self.dilation, self.kernel_size, strict=True
        )
        least = [(i - 1) * s - 2 * p + d * (k - 1) + 1 for i, s, p, d, k in geometry]
        more = tuple(w - n for w, n in zip(wanted, least, strict=True))
        if any(not 0 <= m < s for m, s in zip(more, self.stride, strict=True)):
            most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
            raise ValueError(f"output_size is {tuple(wanted)}, must be from {least} to {most}")
        return more


def _mode(layer: Any) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """``[B, C, *size]`` -> ``[B, C, *positions, *kernel]``, a view."""
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x


def _vectors(patches: Tensor, groups: int) -> Tensor:
    """``[B, C, *positions, *kernel]`` -> ``[groups, B * positions, C / groups * prod(kernel)]``."""
    n = (patches.dim() - 2) // 2
    patches = patches.unflatten(1, (groups, -1))
    order = [1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n)]
    columns = math.prod(patches.shape[2:3] + patches.shape[3 + n :])
    return patches.permute(order).reshape(groups, -1, columns)


class QConv1d(QConv):
    """``nn.Conv1d`` with its weight ``[out, in / groups, k]`` quantized."""

    float_class = nn.Conv1d
    dimensions = 1


class QConv2d(QConv):
    """``nn.Conv2d`` with its weight ``[out, in / groups, kH, kW]`` quantized."""

    float_class = nn.Conv2d
    dimensions = 2


class QConv3d(QConv):
    """``nn.Conv3d`` with its weight ``[out, in / groups, kD, kH, kW]`` quantized."""

    float_class = nn.Conv3d
    dimensions = 3


class QConvTranspose1d(QConvTranspose):
    """``nn.ConvTranspose1d`` with its weight ``[in, out / groups, k]`` quantized."""

    float_class = nn.ConvTranspose1d
    dimensions = 1


class QConvTranspose2d(QConvTranspose):
    """``nn.ConvTranspose2d`` with its weight ``[in, out / groups, kH, kW]`` quantized."""

    float_class = nn.ConvTranspose2d
    dimensions = 2


class QConvTranspose3d(QConvTranspose):
    """``nn.ConvTranspose3d`` with its weight ``[in, out / groups, kD, kH, kW]`` quantized."""

    float_class = nn.ConvTranspose3d
    dimensions = 3


CONVOLUTIONS = (QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d)
