"""SQNR of static and dynamic int8 beside ONNX Runtime's own quantization, as JSON lines.

    python benchmarks/accuracy.py [--models MobileNetV2 ...] > benchmarks/results/accuracy.jsonl

Each line is one model under one treatment: the SQNR of the outputs on data that were not used for
calibration, against the float model. ``onnxruntime static`` is ONNX Runtime's ``quantize_static``
(min-max, uint8 activations, int8 weights per channel) on the same float model and the same
calibration data. Weights are random, but for the model that is said to be trained; batch-norm
statistics are those of the calibration data, because with the initial ones signals fade, and the
error with them. Lines with an ``algorithm`` tell what each gains over rounding with ranges of
min-max. ``goal`` lines tell which layers stay in float for a SQNR, the seconds that it took to
choose them, and the speed that is left over the float model in ONNX Runtime (interleaved).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ort
import torch
from lines import say, tell_head
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from families import convolutional
from families.family import images
from graph_models import Encoder

from qkit.errors import QkitError
from qkit.flows import lower
from qkit.flows.data import in_memory
from qkit.flows.demo import load_digits, train
from qkit.flows.goal import reach
from qkit.flows.pt2e import convert
from qkit.graph import DIALECTS, Captured, capture, quiet
from qkit.report import compare
from qkit.spec import Recipe, parse
from qkit.targets.backend import Session
from qkit.targets.onnx import BACKEND, runtime

CALIBRATION, HELD_OUT = 32, 16
GOAL_DB = 18.0


class Inverted(nn.Module):
    """MobileNetV2's block: expand, filter each channel, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        conv, wide = convolutional.ConvNorm, inputs * expand
        first = [conv(inputs, wide, 1, act=nn.ReLU6)] if expand > 1 else []
        self.body = nn.Sequential(
            *first,
            conv(wide, wide, 3, stride, wide, nn.ReLU6),
            conv(wide, outputs, 1, act=None),
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def mobilenet_v2(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """MobileNetV2 at its full depth, 53 layers, of so many times its width."""
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    inputs = int(32 * width)
    blocks: list[nn.Module] = [convolutional.ConvNorm(3, inputs, 3, 2, act=nn.ReLU6)]
    for expand, outputs, count, stride in [*rows, (6, 160, 3, 2), (6, 320, 1, 1)]:
        for index in range(count):
            wide = int(outputs * width)
            blocks.append(Inverted(inputs, wide, stride if index == 0 else 1, expand))
            inputs = wide
    last = int(1280 * width)
    blocks.append(convolutional.ConvNorm(inputs, last, 1, act=nn.ReLU6))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)
    return convolutional.Classifier(*blocks, *head)


def trained() -> nn.Module:
    """MobileNetV2 of a quarter of its width, trained on scikit-learn's digits."""
    model = mobilenet_v2(0.25, 10)
    train(model, replace(load_digits(), train_x=digits(1347, 1)), epochs=12)
    return model


def digits(n: int, seed: int) -> Tensor:
    """Images of digits, as many times enlarged as the network makes them smaller: those of the
    training for seed 1, else others."""
    data = load_digits()
    x = data.train_x if seed == 1 else data.test_x
    return nn.functional.interpolate(x[:n], scale_factor=4.0).expand(-1, 3, -1, -1).contiguous()


def mlp() -> nn.Module:
    return convolutional.Classifier(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


@dataclass(frozen=True)
class Case:
    """A model, and inputs of a seed."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]
    trained: bool = False


def pictures(channels: int, side: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: images(n, channels, side, seed)


def features(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(8, 64, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, 8, generator=generator) @ mixed


CASES = {
    family.name: Case(family.build, pictures(*family.inputs()["x"].shape[1:3]))
    for family in convolutional.FAMILIES
} | {
    "Encoder": Case(
        Encoder,
        lambda n, seed: torch.randint(0, 31, (n, 9), generator=torch.Generator().manual_seed(seed)),
    ),
    "MLP": Case(mlp, features),
    "MobileNetV2, full": Case(mobilenet_v2, pictures(3, 96)),
    "MobileNetV2, trained": Case(trained, digits, trained=True),
}
# One by one, and all that go together.
ALGORITHMS = (
    *("equalization", "smoothquant", "bias-correction", "gptq", "adaround"),
    "equalization+adaround+bias-correction",
)


def built(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with statistics of its calibration data, these, and held-out data."""
    torch.manual_seed(0)
    model, calibration = case.build(), case.inputs(CALIBRATION, 1)
    if case.trained:
        return model.eval(), calibration, case.inputs(HELD_OUT, 2)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.momentum = None
    with torch.no_grad():
        model(calibration)
    return model.eval(), calibration, case.inputs(HELD_OUT, 2)


def onnxruntime_static(captured: Captured, data: Tensor) -> Session:
    """ONNX Runtime's own quantization of the float file that qkit writes of a model that takes one
    tensor."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        file, out = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        BACKEND.export_float(captured, file)
        name = runtime.open_session(file, 1).get_inputs()[0].name
        ort.quantize_static(file, out, [{name: part} for part in data.split(8)])
        return runtime.load(out, 2)


def sqnr(reference: Tensor, output: Tensor) -> float | None:
    found = compare([reference], [output]).sqnr_db
    return None if found is None else round(found, 2)


def measured(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """The lines of one model."""
    model, data, x = built(case)
    with torch.no_grad():
        reference = model(x)

    def line(treatment: str, value: float | None, **more: Any) -> dict[str, Any]:
        return {"model": name, "treatment": treatment, "sqnr_db": value} | more

    rival = onnxruntime_static(capture(model, (data,), {}), data)
    yield line("onnxruntime static", sqnr(reference, rival((x,), {})[0]))
    for observer in ("minmax", "percentile", "mse"):
        done = convert(model, "int8-static", data, observer=observer)
        yield line(f"static, {observer}", sqnr(reference, done.module(x)))
    try:
        done = convert(model, "int8-dynamic", data)
        yield line("dynamic", sqnr(reference, done.module(x)))
    except QkitError as error:
        yield line("dynamic", None, reason=error.problem)
    for algorithm in ALGORITHMS:
        for observer in ("minmax", "mse") if algorithm == ALGORITHMS[-1] else ("minmax",):
            recipe = Recipe.simple(parse("int8-static"), algorithm=algorithm)
            done = convert(model, recipe, data, observer=observer)
            value = sqnr(reference, done.module(x))
            yield line(f"{observer}, {algorithm}", value, algorithm=algorithm)
    yield from goal(model, data, x, reference, line)


def goal(model: nn.Module, data: Tensor, x: Tensor, reference: Tensor, line: Any) -> Iterator[Any]:
    """What it takes to reach a SQNR with some layers in float; nothing, if it is there anyhow."""
    start = time.perf_counter()
    recipe, notes = reach(
        model,
        Recipe.simple(parse("int8-static")),
        in_memory(data),
        GOAL_DB,
        dialect=DIALECTS["onnx"],
        observer="mse",
        dims=None,
    )
    seconds = round(time.perf_counter() - start, 1)
    if not notes:
        return
    done = convert(model, recipe, data, observer="mse")
    left = [rule.match for rule in recipe.rules if rule.scheme is None]
    value = sqnr(reference, done.module(x))
    with tempfile.TemporaryDirectory() as folder:
        report = lower(model, recipe, Path(folder, "out"), calib=data, observer="mse")
    yield line(
        f"static, mse, goal {GOAL_DB:g} dB",
        value,
        float=left,
        layers=len(done.sites),
        seconds=seconds,
        speedup=report.latency_ms["speedup"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args().models
    tell_head()
    for name in chosen:
        for line in measured(name, CASES[name]):
            say(**line)


if __name__ == "__main__":
    main()
