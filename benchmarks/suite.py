"""How fast this commit is, by pytest-benchmark: for a comparison with another one.

    pytest benchmarks/suite.py --benchmark-json=before.json
    pytest benchmarks/suite.py --benchmark-json=after.json
    qkit bench compare before.json after.json --control '*torch*'

Small cases of numerics, kernels, layers, models and compression, of the same makers as the scripts
beside this one, which measure against the peers. torch's own contenders do not change with qkit:
they tell what the machine did between two runs. Not collected by ``pytest`` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import layers
import models
import numerics
import pytest
import torch
from pt2e_models import MODELS
from torch import nn

import qkit
from qkit.algorithms import rtn
from qkit.flows.demo import digits_cnn
from qkit.numerics import choose_qparams, quantize
from qkit.numerics.codebook import fit_codebook
from qkit.packing import entropy
from qkit.spec import parse

FLOAT = "torch"  # the contender that is no work of ours
SHAPE = (1024, 4096)
OPERATIONS = [
    f"{kind} {verb}"
    for kind, verbs in (
        ("int8 per-channel", ("quantize", "dequantize")),
        ("int4", ("pack", "unpack")),
        ("int4 group-128", ("quantize", "dequantize")),
    )
    for verb in verbs
]
SCHEMES = ["w8a16", "w4a16-g32", "w8a8"]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """The same weights and inputs in every test, and no gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@functools.cache
def operations() -> dict[str, tuple[numerics.Contenders, int]]:
    w = torch.randn(SHAPE)
    return numerics.int8_per_channel(w) | numerics.int4_groups(w)


def quantized(model: nn.Module, scheme: str, inputs: Any) -> nn.Module:
    """``model`` under ``scheme``, or as it is."""
    if scheme == FLOAT:
        return model
    return qkit.quantize(model, scheme, inputs=inputs, latency=False, algorithm="rtn")[0].eval()


@pytest.mark.benchmark(group="numerics")
@pytest.mark.parametrize("contender", ["qkit", "numpy"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_numerics(benchmark: Any, operation: str, contender: str) -> None:
    benchmark(operations()[operation][0][contender])


@pytest.mark.benchmark(group="kernels")
@pytest.mark.parametrize("scheme", [FLOAT, *SCHEMES])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_linear(benchmark: Any, rows: int, scheme: str) -> None:
    x = torch.randn(rows, 1536)
    benchmark(quantized(nn.Linear(1536, 1536), scheme, x), x)


@pytest.mark.benchmark(group="layers")
@pytest.mark.parametrize("scheme", [FLOAT, *SCHEMES[:2]])
@pytest.mark.parametrize("layer", ["resnet18 layer3 3x3", "resnet50 1x1 in", "digits 3x3"])
def test_convolution(benchmark: Any, layer: str, scheme: str) -> None:
    make, size = layers.CONVOLUTIONS[layer]
    float_layer = make().eval()
    x = torch.randn(1, float_layer.in_channels, *size)
    net = float_layer if scheme == FLOAT else layers.quantized(float_layer, scheme)
    benchmark(net, x)


@pytest.mark.benchmark(group="models")
@pytest.mark.parametrize("scheme", [FLOAT, *SCHEMES[:2]])
@pytest.mark.parametrize("name", ["digits CNN", "LSTM", "MobileNetV2"])
def test_model(benchmark: Any, name: str, scheme: str) -> None:
    if name == models.DIGITS.name:
        model, given = digits_cnn().eval(), {"input": torch.rand(1, 1, 8, 8)}
    else:
        model = MODELS[name].model()
        given = {key: t[:1] for key, t in MODELS[name].inputs().items()}
    benchmark(functools.partial(quantized(model, scheme, given), **given))


@pytest.mark.benchmark(group="models")
@pytest.mark.parametrize("scheme", [FLOAT, *SCHEMES[:2]])
def test_decoder(benchmark: Any, scheme: str) -> None:
    case = models.decoder(2, 256, 4096)
    ids = case.inputs()
    model = quantized(
        case.model(), scheme, {"ids": ids["prompt"], "at": torch.arange(models.PROMPT)}
    )
    benchmark(functools.partial(models.generate, model, **ids))


@pytest.mark.benchmark(group="compression")
@pytest.mark.parametrize("method", ["huffman", "ans"])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_entropy(benchmark: Any, way: str, method: str) -> None:
    spec = parse("w4a16-channel").weight
    w = torch.randn(SHAPE)
    codes = quantize(w, choose_qparams(w, spec), spec).codes.numpy().ravel()
    if way == "encode":
        benchmark(entropy.encode, codes, method, threads=1)
    else:
        benchmark(entropy.decode, entropy.encode(codes, method, threads=1), threads=1)


@pytest.mark.benchmark(group="compression")
@pytest.mark.parametrize("what", ["codebook", "rtn", "quantize", "prune"])
def test_compression(benchmark: Any, what: str) -> None:
    w, x = torch.randn(256, 1024), torch.rand(8, 1, 8, 8)
    model = digits_cnn().eval()
    benchmark(
        {
            "codebook": lambda: fit_codebook(w, 16),
            "rtn": lambda: rtn(w, parse("w4a16-g32").weight),
            "quantize": lambda: quantized(model, "w8a16", x),
            "prune": lambda: qkit.prune(model, x, amount=0.5, latency=False),
        }[what]
    )
