"""SQNR of static and dynamic int8 beside ONNX Runtime's own quantization, as JSON lines.

    python benchmarks/accuracy.py [--models MobileNetV2 ...] [--again] [--results FILE]

Each line is one model under one treatment: the SQNR of the outputs on data that were not used for
calibration, against the float model. A line is appended to ``benchmarks/results/accuracy.jsonl``
when it is done: a run that was stopped goes on where it was. ``onnxruntime static`` is ONNX
Runtime's ``quantize_static`` (min-max, uint8 activations, int8 weights per channel) on the same
float model and the same calibration data. Weights are random, but for the model that is said to be
trained; batch-norm statistics are those of the calibration data, because with the initial ones
signals fade, and the error with them. Lines with an ``algorithm`` tell what each gains over
rounding with ranges of min-max. ``float, 8-bit input`` is the float model on inputs of 8 bits in
the range of least error, and ``mean of the outputs`` one answer for all inputs, the mean of those
to the calibration data: a model below that tells nothing of its input. ``goal`` lines tell which
layers stay in float for a SQNR, the seconds that it took to choose them, and the speed that is left
over the float model in ONNX Runtime (interleaved).
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
from cells import append, records
from lines import facts
from pt2e_models import efficientnet_b0, mobilenet_v2, mobilenet_v3
from tables import RESULTS
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
from qkit.numerics import OBSERVERS, Observer, fake_quantize, qparams_from_range
from qkit.report import compare
from qkit.spec import Recipe, parse
from qkit.targets.backend import Session
from qkit.targets.onnx import BACKEND, runtime

CALIBRATION, HELD_OUT = 32, 16
GOAL_DB = 18.0


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
    "MobileNetV2, trained": Case(trained, digits, trained=True),
    "MobileNetV2, full": Case(mobilenet_v2, pictures(3, 96)),
    "MobileNetV3, full": Case(mobilenet_v3, pictures(3, 96)),
    "EfficientNet-B0, full": Case(efficientnet_b0, pictures(3, 96)),
}


@dataclass(frozen=True)
class Treatment:
    """How a model is quantized, besides the default: min-max ranges, in the shape of ONNX."""

    name: str
    observer: str = "minmax"
    algorithm: str = "rtn"
    dialect: str = "onnx"
    scheme: str = "int8-static"


def algorithm(name: str, observer: str = "minmax") -> Treatment:
    return Treatment(f"{observer}, {name}", observer, name)


RIVAL, GOAL = "onnxruntime static", f"static, mse, goal {GOAL_DB:g} dB"
# What is lost with everything in float but the input, and with no look at the input at all.
BOUND, BLIND = "float, 8-bit input", "mean of the outputs"
# Observers and targets, and algorithms, one by one and those that go together.
TREATMENTS = (
    Treatment("static, minmax"),
    Treatment("static, inductor", dialect="inductor"),
    Treatment("static, xnnpack", dialect="xnnpack"),
    Treatment("static, percentile", "percentile"),
    Treatment("static, mse", "mse"),
    Treatment("dynamic", scheme="int8-dynamic"),
    *map(algorithm, ("equalization", "smoothquant", "bias-correction", "gptq", "adaround")),
    algorithm("least-squares"),
    algorithm("least-squares", "mse"),
    algorithm("equalization+adaround+bias-correction", "mse"),
    algorithm("equalization+adaround+least-squares", "mse"),
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


def measured(name: str, case: Case, done: set[str]) -> Iterator[dict[str, Any]]:
    """The lines of one model, but for the treatments that are ``done``."""
    if done >= {RIVAL, BOUND, BLIND, GOAL, *(each.name for each in TREATMENTS)}:
        return
    model, data, x = built(case)
    with torch.no_grad():
        reference = model(x)
    if RIVAL not in done:
        rival = onnxruntime_static(capture(model, (data,), {}), data)
        yield {"treatment": RIVAL, "sqnr_db": sqnr(reference, rival((x,), {})[0])}
    if BLIND not in done:
        with torch.no_grad():
            mean = model(data).mean(0, keepdim=True)
        yield {"treatment": BLIND, "sqnr_db": sqnr(reference, mean.expand_as(reference))}
    if BOUND not in done:
        yield {"treatment": BOUND} | bound(model, data, x, reference)
    for each in TREATMENTS:
        if each.name not in done:
            yield {"treatment": each.name} | treated(each, model, data, x, reference)
    if GOAL not in done:
        yield {"treatment": GOAL} | goal(model, data, x, reference)


def bound(model: nn.Module, data: Tensor, x: Tensor, reference: Tensor) -> dict[str, Any]:
    """What the float model makes of inputs of 8 bits, in the range of least error."""
    if not x.is_floating_point():
        return {"sqnr_db": None, "reason": "its input are numbers of tokens"}
    spec = DIALECTS["onnx"].input_spec("static")
    observer = Observer(OBSERVERS["mse"](), spec)
    observer.update(data)
    rounded = fake_quantize(x, qparams_from_range(*observer.range(), spec), spec)
    with torch.no_grad():
        return {"sqnr_db": sqnr(reference, model(rounded))}


def treated(
    given: Treatment, model: nn.Module, data: Tensor, x: Tensor, reference: Tensor
) -> dict[str, Any]:
    """What a treatment gives."""
    named = {} if given.algorithm == "rtn" else {"algorithm": given.algorithm}
    recipe = Recipe.simple(parse(given.scheme), algorithm=given.algorithm)
    start = time.perf_counter()
    try:
        done = convert(model, recipe, data, observer=given.observer, dialect=given.dialect)
    except QkitError as error:
        return named | {"sqnr_db": None, "reason": error.problem}
    seconds = round(time.perf_counter() - start, 1)
    return named | {"sqnr_db": sqnr(reference, done.module(x)), "seconds": seconds}


def goal(model: nn.Module, data: Tensor, x: Tensor, reference: Tensor) -> dict[str, Any]:
    """What it takes to reach a SQNR with some layers in float."""
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
        return {"sqnr_db": None, "reason": "it is there with all layers"}
    done = convert(model, recipe, data, observer="mse")
    value = sqnr(reference, done.module(x))
    with tempfile.TemporaryDirectory() as folder:
        report = lower(model, recipe, Path(folder, "out"), calib=data, observer="mse")
    return {
        "sqnr_db": value,
        "float": [rule.match for rule in recipe.rules if rule.scheme is None],
        "layers": len(done.sites),
        "seconds": seconds,
        "speedup": report.latency_ms["speedup"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--again", action="store_true", help="measure what has a line, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.jsonl")
    given = parser.parse_args()
    if not records(given.results):
        append(given.results, facts())
    before = [] if given.again else records(given.results)
    for name in given.models:
        done = {r["treatment"] for r in before if r.get("model") == name}
        for line in measured(name, CASES[name], done):
            print(name, line["treatment"], line["sqnr_db"], line.get("reason", ""), flush=True)
            append(given.results, {"model": name} | line)


if __name__ == "__main__":
    main()
