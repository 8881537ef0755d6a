"""A two-dimensional convolution with a quantized weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from qkit import ops
from qkit.nn.layer import QLayer
from qkit.spec import QSpec


class QConv2d(QLayer):
    """``nn.Conv2d`` with its weight ``[out, in / groups, kH, kW]`` quantized.

    A channel's weights are one row of ``in / groups * kH * kW`` values; groups of a per-group
    scheme run along that row. Input ``[B, C, H, W]`` or ``[C, H, W]`` in fp32, bf16, fp16 or fp64.
    """

    float_class = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, spec: QSpec, acts: QSpec | None = None) -> None:
        super().__init__(layer, spec, acts)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.groups = layer.groups
        self.padding_mode = layer.padding_mode
        # Before, after, of the last dimension first: 'same' may need one more on one side.
        self._pad = tuple(layer._reversed_padding_repeated_twice)

    @staticmethod
    def input_vectors(layer: nn.Conv2d, x: Tensor) -> Tensor:
        """What the weight is multiplied with: ``[groups, vectors, in / groups * kH * kW]``."""
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x.reshape(-1, *x.shape[-3:]), layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        # [B, channels * kH * kW, positions], the channels of a group side by side
        patches = patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2)
        return patches.flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, out, H', W']`` (or both without ``B``)."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise RuntimeError(
                f"QConv2d takes {self.in_channels} channels, got shape {tuple(x.shape)}"
            )
        left, right, top, bottom = self._pad
        padding = [top, left]
        if self.padding_mode != "zeros" or left != right or top != bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._pad, mode=mode), [0, 0]
        return ops.conv2d(
            x,
            self.stored_weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.bits,
            self.group,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
