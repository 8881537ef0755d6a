"""The eleven architectures of ``benchmarks/pruning.py``, at their published sizes, untrained.

transformers builds those that it has from their configurations (nothing is downloaded); the rest
is written here, from the papers. ``small`` makes each of them tiny, with the same connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, dict[str, Tensor]]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
        )
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


def densenet(blocks: tuple[int, ...], growth: int) -> nn.Module:
    """DenseNet-BC (Huang et al. 2017): 121 layers with blocks of 6, 12, 24, 16."""
    width = 2 * growth
    layers: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate(blocks):
        for _ in range(count):
            layers.append(Dense(width, growth))
            width += growth
        if index < len(blocks) - 1:
            half = nn.Conv2d(width, width // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
            width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, 1000))


class Inception(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.one = conv(inputs, one, 1)
        self.three = nn.Sequential(conv(inputs, reduce3, 1), conv(reduce3, three, 3))
        self.five = nn.Sequential(conv(inputs, reduce5, 1), conv(reduce5, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


# Table 1 of Szegedy et al. 2015: the six widths of each module; 0 is a pooling.
_INCEPTIONS = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), 0,
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), 0,
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip


def googlenet(shrink: int) -> nn.Module:
    width = 192 // shrink
    stem = (conv(3, 64 // shrink, 7, 2), nn.MaxPool2d(3, 2, 1), conv(64 // shrink, 64 // shrink, 1))
    layers: list[nn.Module] = [*stem, conv(64 // shrink, width, 3), nn.MaxPool2d(3, 2, 1)]
    for widths in _INCEPTIONS:
        if isinstance(widths, int):
            layers.append(nn.MaxPool2d(3, 2, 1))
            continue
        scaled = tuple(n // shrink for n in widths)
        layers.append(Inception(width, scaled))
        width = scaled[0] + scaled[2] + scaled[4] + scaled[5]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class UNet(nn.Module):
    """Ronneberger et al. 2015, padded, with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        pairs = zip([3, *widths], widths, strict=False)
        self.down = nn.ModuleList(nn.Sequential(conv(i, o, 3), conv(o, o, 3)) for i, o in pairs)
        wide = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in wide)
        self.join = nn.ModuleList(nn.Sequential(conv(i, o, 3), conv(o, o, 3)) for i, o in wide)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


class Tagger(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(10000, width)
        self.core = nn.LSTM(width, 2 * width, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4 * width, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.embed(ids))[0])


def hf(model: str, config: str, **fields: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields))


def resnet(kind: str, depths: list[int], widths: list[int], stem: int) -> nn.Module:
    return hf(
        "ResNetForImageClassification", "ResNetConfig", layer_type=kind, depths=depths,
        hidden_sizes=widths, embedding_size=stem, num_labels=1000,
    )  # fmt: skip


def transformer(small: bool) -> dict[str, int]:
    sizes = (64, 2, 4, 256) if small else (768, 12, 12, 3072)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, sizes, strict=True))


def models(*, small: bool) -> dict[str, Callable[[], Built]]:
    """Name -> function that builds the model, in eval mode, and an input of one sample."""
    side = 64 if small else 224
    part = 8 if small else 1

    def image(model: nn.Module, name: str = "x") -> Built:
        return model.eval(), {name: torch.randn(1, 3, side, side)}

    def text(model: nn.Module, name: str = "input_ids") -> Built:
        return model.eval(), {name: torch.randint(3, 100, (1, 16 if small else 128))}

    def named(model: nn.Module) -> Built:
        return image(model, "pixel_values")

    def on_x(model: nn.Sequential) -> Built:
        return model.eval(), {"input": torch.randn(1, 3, side, side)}

    widths = [64 // part, 128 // part, 256 // part, 512 // part]
    wide = [4 * n for n in widths]
    gpt = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 257} if small else {}
    scale = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320} if small else {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
    }  # fmt: skip
    vision = {"image_size": side, "num_labels": 1000}
    mobile = {"depth_multiplier": 0.25 if small else 1.0}
    return {
        "ResNet-18": lambda: named(resnet("basic", [2, 2, 2, 2], widths, 64 // part)),
        "ResNet-50": lambda: named(resnet("bottleneck", [3, 4, 6, 3], wide, 64 // part)),
        "MobileNetV2": lambda: named(
            hf("MobileNetV2ForImageClassification", "MobileNetV2Config", **vision, **mobile)
        ),
        "DenseNet-121": lambda: on_x(densenet((2, 2) if small else (6, 12, 24, 16), 32 // part)),
        "GoogLeNet": lambda: on_x(googlenet(part)),
        "EfficientNet-B0": lambda: named(
            hf("EfficientNetForImageClassification", "EfficientNetConfig", **vision, **scale)
        ),
        "U-Net": lambda: image(UNet(64 // part)),
        "ViT": lambda: named(
            hf("ViTForImageClassification", "ViTConfig", **vision, **transformer(small))
        ),
        "BERT": lambda: text(
            hf("BertForSequenceClassification", "BertConfig", **transformer(small))
        ),
        "GPT": lambda: text(hf("GPT2LMHeadModel", "GPT2Config", use_cache=False, **gpt)),
        "LSTM": lambda: text(Tagger(256 // part), "ids"),
    }
