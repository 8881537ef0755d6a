"""Families that give images, boxes or embeddings: U-Net, detector, Siamese tower, diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from families.convolutional import ConvNorm
from families.family import Family, images, values
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Down, up again by transposed convolutions, and the skips joined."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(self._pair(*step) for step in pairwise((3, *widths[:-1])))
        self.bottom = self._pair(*steps[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(steps))
        self.join = nn.ModuleList(self._pair(2 * a, a) for a, _ in reversed(steps))
        self.head = nn.Conv2d(widths[0], 5, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(ConvNorm(inputs, outputs, 3), ConvNorm(outputs, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


class CrossStage(nn.Module):
    """YOLO's CSP block: half of the channels pass by the bottlenecks."""

    def __init__(self, inputs: int, outputs: int, *, skips: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = ConvNorm(inputs, outputs, 1, act=nn.SiLU)
        self.body = nn.Sequential(
            ConvNorm(half, half, 3, act=nn.SiLU), ConvNorm(half, half, 3, act=nn.SiLU)
        )
        self.leave = ConvNorm(3 * half, outputs, 1, act=nn.SiLU)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.enter(x).chunk(2, 1)
        third = self.body(second)
        return self.leave(torch.cat([first, second, second + third if self.skips else third], 1))


class Yolo(nn.Module):
    """Two scales, a neck that goes up and down again, heads with boxes decoded on their grids."""

    anchors: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.outputs = 5 + classes
        self.stem = ConvNorm(3, 16, 3, 2, act=nn.SiLU)
        self.fine = nn.Sequential(ConvNorm(16, 32, 3, 2, act=nn.SiLU), CrossStage(32, 32))
        self.coarse = nn.Sequential(ConvNorm(32, 48, 3, 2, act=nn.SiLU), CrossStage(48, 48))
        self.pyramid = ConvNorm(4 * 48, 48, 1, act=nn.SiLU)
        self.lateral = ConvNorm(48, 32, 1, act=nn.SiLU)
        self.upwards = CrossStage(64, 32, skips=False)
        self.downwards = ConvNorm(32, 32, 3, 2, act=nn.SiLU)
        self.again = CrossStage(64, 48, skips=False)
        self.heads = nn.ModuleList(nn.Conv2d(n, 2 * self.outputs, 1) for n in (32, 48))
        anchors = torch.tensor([[[4.0, 5.0], [8.0, 6.0]], [[12.0, 16.0], [24.0, 20.0]]])
        self.register_buffer("anchors", anchors)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        pools = [coarse]
        for _ in range(3):  # spatial pyramid
            pools.append(F.max_pool2d(pools[-1], 5, 1, padding=2))
        lateral = self.lateral(self.pyramid(torch.cat(pools, 1)))
        fine = self.upwards(torch.cat([F.interpolate(lateral, scale_factor=2.0), fine], 1))
        coarse = self.again(torch.cat([self.downwards(fine), lateral], 1))
        boxes = [self._decode(i, f, 4 << i) for i, f in enumerate((fine, coarse))]
        return torch.cat(boxes, 1)

    def _decode(self, scale: int, features: Tensor, stride: int) -> Tensor:
        """``[B, boxes, x y w h objectness classes...]`` in pixels and probabilities."""
        raw = self.heads[scale](features)
        height, width = raw.shape[-2:]
        raw = raw.view(-1, 2, self.outputs, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        y, x = torch.meshgrid(
            torch.arange(height, device=raw.device),
            torch.arange(width, device=raw.device),
            indexing="ij",
        )
        centre = (raw[..., :2] * 2 - 0.5 + torch.stack([x, y], -1)) * stride
        size = (raw[..., 2:4] * 2) ** 2 * self.anchors[scale].view(1, 2, 1, 1, 2)
        return torch.cat([centre, size, raw[..., 4:]], -1).flatten(1, 3)


class Siamese(nn.Module):
    """One tower for both faces, embeddings of length 1, and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.PReLU(16),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.PReLU(32),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(288, 64),
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (F.normalize(self.tower(x), dim=1) for x in (a, b))
        return first, second, (first - second).norm(dim=1)


class Mixing(nn.Module):
    """The residual block of a diffusion U-Net, which a time embedding shifts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.time = nn.Linear(64, outputs)
        self.leave = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.enter(x) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.leave(hidden)


class Attention(nn.Module):
    """Over the pixels, and from them to the text that conditions the image."""

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.itself = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(channels, 4, kdim=text, vdim=text, batch_first=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        pixels = pixels + self.itself(pixels, pixels, pixels, need_weights=False)[0]
        pixels = pixels + self.cross(pixels, text, text, need_weights=False)[0]
        return x + pixels.transpose(1, 2).unflatten(2, x.shape[-2:])


class Diffusion(nn.Module):
    """A diffusion U-Net of one level: noise, time and text in, the noise's estimate out."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.enter = Mixing(32, 32)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.middle, self.attention = Mixing(32, 48), Attention(48, 33)
        self.up = nn.Conv2d(48, 32, 3, padding=1)
        self.leave = Mixing(64, 32)
        self.head = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(16, device=sample.device) * (-9.21 / 16))
        angles = timestep[:, None].to(sample.dtype) * rates.to(sample.dtype)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        top = self.enter(self.stem(sample), time)
        x = self.attention(self.middle(self.down(top), time), text)
        x = self.up(F.interpolate(x, scale_factor=2.0))
        return self.head(self.leave(torch.cat([x, top], 1), time))


FAMILIES = [
    Family("U-Net", UNet, lambda: {"x": images(4, 3, 16)}),
    Family("YOLO", Yolo, lambda: {"x": images(4, 3, 32)}),
    Family("Siamese", Siamese, lambda: {"a": images(4, 1, 15), "b": images(4, 1, 15, seed=1)}),
    Family(
        "Diffusion U-Net",
        Diffusion,
        lambda: {
            "sample": values(2, 4, 8, 8),
            "timestep": torch.tensor([3, 700]),
            "text": values(2, 7, 33, seed=1),
        },
        depth=23,  # time 2, stem, 3 x (enter, time, leave), 2 x 4 of attention, down, up, head
    ),
]
