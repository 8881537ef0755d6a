"""Single layers, qkit beside torch: milliseconds and error, as JSON lines.

    python benchmarks/layers.py [--quick] [--threads N] > layers.jsonl

Each line is one contender for one (layer, rows): a scheme of qkit on fp32, bf16 or fp16
activations, or a layer of torch itself. All of one (layer, rows) are timed in one process, by
interleaved calls over several copies of the weight, so that none finds its weight in the cache.
``speedup`` is the median of torch's fp32 layer by that of the contender; below 1 it is slower.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qkit import ops
from qkit.algorithms import rtn
from qkit.nn import QUANTIZED
from qkit.report import compare, machine, measure, versions
from qkit.spec import parse

SCHEMES = ["w8a16", "w8a16-g128", "w4a16-g128", "w4a16-g32-asym", "w2a16-g128"]
# Bytes of weights to go round: more than the last-level cache of the machines we know.
ROTATED_BYTES = 512 << 20


def copies(make: Callable[[], nn.Module], values: int, rotated: int) -> list[nn.Module]:
    """Enough layers that going round them leaves the caches cold."""
    return [make() for _ in range(max(2, rotated // (4 * values)))]


def quantized(layer: nn.Module, scheme: str) -> nn.Module:
    """The qkit layer of a float one."""
    q = rtn(layer.weight.detach().flatten(1), parse(scheme).weight)
    return QUANTIZED[type(layer)].from_float(layer, q)


def caller(layers: list[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """A function that calls the next layer at each call."""
    turn = itertools.cycle(layers)

    def call() -> Tensor:
        with torch.no_grad():
            return next(turn)(x)

    return call


def float_layers(layers: list[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """The same layers in another dtype."""
    return [copy.deepcopy(layer).to(dtype) for layer in layers]


class Int8Pack(nn.Module):
    """torch's own int8 weight-only product, with a scale for each channel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias.detach().bfloat16()
        q = rtn(layer.weight.detach(), parse("w8a16").weight)
        self.codes, self.scale = q.codes, q.qparams.scale.flatten().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scale) + self.bias


class Int4Pack(nn.Module):
    """torch's own int4 weight-only product, with a scale and an offset for each 128 columns."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias.detach().bfloat16()
        q = rtn(layer.weight.detach(), parse("w4a16-g128").weight)
        self.codes = torch._convert_weight_to_int4pack_for_cpu((q.codes + 8).int(), 1)
        scale = q.qparams.scale.bfloat16()
        pairs = torch.stack([scale, torch.zeros_like(scale)], 2)
        self.scales = pairs.transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, 128, self.scales) + self.bias


def contenders(layers: list[nn.Module]) -> dict[tuple[str, str], list[nn.Module]]:
    """(name, dtype of the activations): the layers to go round."""
    found: dict[tuple[str, str], list[nn.Module]] = {("torch", "float32"): layers}
    found["torch", "bfloat16"] = float_layers(layers, torch.bfloat16)
    found["torch", "float16"] = float_layers(layers, torch.float16)
    found["torch int8pack", "bfloat16"] = [Int8Pack(layer) for layer in layers]
    found["torch int4pack", "bfloat16"] = [Int4Pack(layer) for layer in layers]
    for scheme in SCHEMES:
        found[scheme, "float32"] = [quantized(layer, scheme) for layer in layers]
    for scheme, dtype in itertools.product(["w8a16", "w4a16-g128"], ["bfloat16", "float16"]):
        found[scheme, dtype] = found[scheme, "float32"]
    return found


def records(
    size: int, rows: list[int], seconds: float, rotated: int = ROTATED_BYTES
) -> Iterator[dict]:
    """One record for each number of rows and contender; those of a number are timed together."""
    layers = copies(lambda: nn.Linear(size, size), size * size, rotated)
    found = contenders(layers)
    for count in rows:
        x = torch.randn(count, size)
        inputs = {key: x.to(getattr(torch, key[1])) for key in found}
        times = measure(
            {"/".join(key): caller(group, inputs[key]) for key, group in found.items()},
            seconds=seconds,
        )
        base = times["torch/float32"]
        with torch.no_grad():
            want = layers[0](x)
        for (name, dtype), group in found.items():
            with torch.no_grad(), ops.count_calls() as kernels:
                error = compare([want], [group[0](inputs[name, dtype]).float()])
            own = times[f"{name}/{dtype}"]
            yield {
                "layer": f"Linear({size}, {size})",
                "rows": count,
                "scheme": name,
                "activations": dtype,
                "ms": own.to_json(),
                "torch_fp32_ms": base.to_json(),
                "speedup": round(base.median / own.median, 3),
                "sqnr_db": None if error.sqnr_db is None else round(error.sqnr_db, 2),
                "kernels": dict(kernels),
                "threads": torch.get_num_threads(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small layer, for a check")
    parser.add_argument("--threads", type=int, help="threads of torch and qkit")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(json.dumps({"machine": machine(), "versions": versions(), "command": "layers.py"}))
    plan = [(1024, [1, 16, 128], 5.0), (4096, [1, 4, 16, 64, 128, 512], 12.0)]
    if options.quick:
        plan = [(256, [1], 0.2)]
    for size, rows, seconds in plan:
        rotated = 1 << 20 if options.quick else ROTATED_BYTES
        for record in records(size, rows, seconds, rotated):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
