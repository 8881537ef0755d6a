"""Convolutional classifiers: tiny, with every kind of layer and skip of the originals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from families.family import Family, images
from torch import Tensor, nn
from torch.nn import functional as F

Act = Callable[[Tensor], Tensor]


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class ConvRelu(nn.Sequential):
    """As networks were before batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.ReLU())


def he(model: nn.Module) -> nn.Module:
    """``model`` with He's initial weights, which keep a signal's size where nothing normalises."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class Classifier(nn.Sequential):
    """A body whose only input is ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def lenet() -> nn.Module:
    return Classifier(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def alexnet() -> nn.Module:
    return Classifier(
        nn.Conv2d(3, 24, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 48, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 48, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(192, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def vgg() -> nn.Module:
    return Classifier(
        ConvRelu(3, 16, 3),
        ConvRelu(16, 16, 3),
        nn.MaxPool2d(2),
        ConvRelu(16, 32, 3),
        ConvRelu(32, 32, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 10),
    )


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = ConvRelu(inputs, width, 1)
        self.three = nn.Sequential(ConvRelu(inputs, width, 1), ConvRelu(width, 2 * width, 3))
        self.five = nn.Sequential(ConvRelu(inputs, width // 2, 1), ConvRelu(width // 2, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), ConvRelu(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """The second head is for training only; its weights are part of the model all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvRelu(3, 16, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.first = Inception(16, 8)
        self.second = Inception(40, 12)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(160, 10))
        self.head = nn.Linear(60, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(self.stem(x))
        logits = self.head(self.second(x).mean((2, 3)))
        return (logits, self.aux(x)) if self.training else logits


class Residual(nn.Module):
    """A basic block, or a bottleneck; the skip is projected where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            width = outputs // 4
            self.body = nn.Sequential(
                ConvNorm(inputs, width, 1),
                ConvNorm(width, width, 3, stride),
                ConvNorm(width, outputs, 1, act=None),
            )
        else:
            self.body = nn.Sequential(
                ConvNorm(inputs, outputs, 3, stride), ConvNorm(outputs, outputs, 3, act=None)
            )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    return Classifier(
        ConvNorm(3, 16, 7, 2),
        nn.MaxPool2d(3, 2, padding=1),
        Residual(16, 16, 1, bottleneck=False),
        Residual(16, 64, 2, bottleneck=True),
        Residual(64, 64, 1, bottleneck=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Dense(nn.Module):
    """Normalisation before the convolutions, and all that came before as input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet() -> nn.Module:
    return Classifier(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        Dense(16, 12),
        Dense(28, 12),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 20, 1, bias=False),
        nn.AvgPool2d(2),
        Dense(20, 12),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class SqueezeExcite(nn.Module):
    def __init__(
        self, channels: int, squeezed: int, act: Act = F.silu, gate: Act = torch.sigmoid
    ) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.excite(self.act(self.squeeze(scale))))


class Inverted(nn.Module):
    """The block of MobileNets and of EfficientNet: expand to ``wide`` channels, depthwise, (squeeze
    and excite, by what ``excite`` makes for so many channels,) project."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        wide: int,
        act: type[nn.Module],
        excite: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(inputs, wide, 1, act=act) if wide != inputs else nn.Identity(),
            ConvNorm(wide, wide, kernel, stride, groups=wide, act=act),
            excite(wide) if excite else nn.Identity(),
            ConvNorm(wide, outputs, 1, act=None),
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def mobilenet() -> nn.Module:
    return Classifier(
        ConvNorm(3, 16, 3, 2, act=nn.ReLU6),
        Inverted(16, 24, 3, 2, 64, nn.ReLU6),
        Inverted(24, 24, 3, 1, 96, nn.ReLU6),
        ConvNorm(24, 96, 1, act=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(96, 10),
    )


def efficientnet() -> nn.Module:
    return Classifier(
        ConvNorm(3, 16, 3, 2, act=nn.SiLU),
        Inverted(16, 24, 5, 2, 64, nn.SiLU, lambda wide: SqueezeExcite(wide, 4)),
        Inverted(24, 24, 3, 1, 96, nn.SiLU, lambda wide: SqueezeExcite(wide, 6)),
        ConvNorm(24, 96, 1, act=nn.SiLU),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def image(channels: int, side: int) -> dict[str, Tensor]:
    return {"x": images(4, channels, side)}


FAMILIES = [
    Family("LeNet", lenet, lambda: image(1, 28)),
    Family("AlexNet", lambda: he(alexnet()), lambda: image(3, 67)),
    Family("VGG", lambda: he(vgg()), lambda: image(3, 32)),
    Family("GoogLeNet", lambda: he(GoogLeNet()), lambda: image(3, 33)),
    Family("ResNet", resnet, lambda: image(3, 33)),
    Family("DenseNet", densenet, lambda: image(3, 17)),
    Family("MobileNetV2", mobilenet, lambda: image(3, 33)),
    Family("EfficientNet", efficientnet, lambda: image(3, 33)),
]
