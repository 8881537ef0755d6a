"""Speed of convolutions and tables beside torch's float layers, as JSON lines.

    python benchmarks/layers.py [--seconds 2] > benchmarks/results/layers.jsonl

Each line is one layer at one batch under one scheme: the ratio of torch's median time to ours,
measured in pairs whose order alternates, without and with the weights kept in float
(``runtime_cache``), and the bytes of both weights. The shapes are those of ResNet-18, the 1x1
convolutions of ResNet-50, the up-sampling of a U-Net, the steps of a speech encoder, and the
tables of small language models.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from lines import say, tell_head
from torch import Tensor, nn

from qkit.algorithms import rtn
from qkit.flows.evaluate import tensor_bytes
from qkit.nn import QUANTIZED, QConv, QLayer, keep_floats
from qkit.report import measure
from qkit.spec import parse

SCHEMES = ("w8a16", "w4a16-g32")
BATCHES = (1, 8)
# name: (layer, size of one sample behind its channels)
CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet18 stem 7x7": (lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False), (224, 224)),
    "resnet18 layer1 3x3": (lambda: nn.Conv2d(64, 64, 3, 1, 1, bias=False), (56, 56)),
    "resnet18 layer2 3x3": (lambda: nn.Conv2d(128, 128, 3, 1, 1, bias=False), (28, 28)),
    "resnet18 layer3 3x3": (lambda: nn.Conv2d(256, 256, 3, 1, 1, bias=False), (14, 14)),
    "resnet18 layer4 3x3": (lambda: nn.Conv2d(512, 512, 3, 1, 1, bias=False), (7, 7)),
    "resnet18 shortcut 1x1": (lambda: nn.Conv2d(256, 512, 1, 2, bias=False), (14, 14)),
    "resnet50 1x1 out": (lambda: nn.Conv2d(64, 256, 1, bias=False), (56, 56)),
    "resnet50 1x1 in": (lambda: nn.Conv2d(2048, 512, 1, bias=False), (7, 7)),
    "mobilenet depthwise": (lambda: nn.Conv2d(192, 192, 3, 1, 1, groups=192), (28, 28)),
    "digits 3x3": (lambda: nn.Conv2d(32, 32, 3, 1, 1), (8, 8)),
    "unet up 2x2": (lambda: nn.ConvTranspose2d(256, 128, 2, 2), (28, 28)),
    "speech 1d": (lambda: nn.Conv1d(512, 512, 3, 2), (400,)),
    "video 3d": (lambda: nn.Conv3d(32, 64, 3, padding=1), (8, 28, 28)),
}
# name: (rows, columns, indices)
TABLES = {"gpt2 tokens": (50257, 768, 32), "minilm tokens": (30522, 384, 128)}


def quantized(layer: Any, scheme: str) -> QLayer:
    """``layer`` with its weight rounded to nearest."""
    cls = QUANTIZED[type(layer)]
    rows = cls.rows(layer).detach().flatten(1)
    return cls.from_float(layer, rtn(rows, parse(scheme).weight)).eval()


def ratio(layer: nn.Module, new: nn.Module, x: Tensor, seconds: float) -> dict[str, float]:
    """Median milliseconds of both, and how many times as fast ``new`` is."""
    times = measure({"float": lambda: layer(x), "new": lambda: new(x)}, seconds=seconds)
    base, ours = times["float"].median, times["new"].median
    return {"float_ms": round(base, 4), "ms": round(ours, 4), "speedup": round(base / ours, 3)}


def compared(name: str, layer: nn.Module, x: Tensor, seconds: float) -> Iterator[dict[str, Any]]:
    """The lines of one layer on one input."""
    for scheme in SCHEMES:
        new = quantized(layer, scheme)
        line: dict[str, Any] = {"layer": name, "input": list(x.shape), "scheme": scheme}
        line |= ratio(layer, new, x, seconds)
        sizes = [tensor_bytes(each.state_dict()) for each in (layer, new)]
        line |= dict(zip(("float_bytes", "bytes"), sizes, strict=True))
        if isinstance(new, QConv):
            cached = copy.deepcopy(new)
            line["kept_bytes"] = keep_floats(cached)
            line["kept_speedup"] = ratio(layer, cached, x, seconds)["speedup"]
        yield line


def main() -> None:
    """Print the machine, then one line for each layer, batch and scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair")
    parser.add_argument("--only", default="", help="layers whose name contains this")
    given = parser.parse_args()
    torch.manual_seed(0)
    tell_head()
    with torch.no_grad():  # what is made in inference mode is looked at anew at each call
        for name, (make, size) in CONVOLUTIONS.items():
            for batch in BATCHES if given.only in name else ():
                layer = make().eval()
                x = torch.randn(batch, layer.in_channels, *size)
                for line in compared(name, layer, x, given.seconds):
                    say(**line)
        for name, (rows, columns, count) in TABLES.items():
            if given.only in name:
                table = nn.Embedding(rows, columns).eval()
                indices = torch.randint(0, rows, (1, count))
                for line in compared(name, table, indices, given.seconds):
                    say(**line)


if __name__ == "__main__":
    main()
