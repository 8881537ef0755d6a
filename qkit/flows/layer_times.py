"""Where the time of a quantized model goes, layer by layer, beside the roofline of the machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qkit.flows.compute import multiply_adds_by_module
from qkit.flows.evaluate import eval_mode, for_dtype
from qkit.models import Inputs, flatten, run
from qkit.nn import QLayer

# Both models are run in turn for about so long, and at least so often.
SECONDS, LEAST = 1.0, 3
# What the roofline is measured with: a copy that leaves the caches, and a product that fills them.
COPY_BYTES, PRODUCT, TRIES = 1 << 26, 1024, 5


def layer_times(model: nn.Module, qmodel: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
    """Milliseconds that each quantized layer takes in one call of ``qmodel``, and the layer in its
    place in the float ``model`` (None where that is inside of a module that was opened).

    ``multiply_adds`` and ``bytes`` (what it reads and writes: weight, inputs, outputs) are those of
    all of its calls, and ``roofline`` the time that one of them alone needs over the time taken.
    """
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QLayer)}
    floats = {name: m for name, m in model.named_modules() if name in layers}
    given = for_dtype(inputs, qmodel)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(model, qmodel))
        work = multiply_adds_by_module(qmodel, given)
        sides = [_Watch(floats, stack), _Watch(layers, stack)]
        runs: list[Callable[[], object]] = [lambda: run(model, inputs), lambda: run(qmodel, given)]
        end = time.perf_counter() + SECONDS
        for repeat in range(1 + 200):
            if repeat > LEAST and time.perf_counter() > end:
                break
            for side, call in zip(sides, runs, strict=True):
                side.begin()
                call()
                if repeat:  # the first warms up
                    side.note()
    copy, product = _bandwidth(), _products()
    before, after = (side.medians() for side in sides)
    rows = []
    for name, seconds in after.items():
        traffic, count = sides[1].traffic[name], work.get(name, 0)
        least = max(traffic / copy, count / product)
        took = before.get(name)
        rows.append(
            {
                "name": name or "(the model)",
                "float_ms": None if took is None else round(took * 1e3, 5),
                "quantized_ms": round(seconds * 1e3, 5),
                "multiply_adds": count,
                "bytes": traffic,
                "roofline": round(least / seconds, 4) if seconds else None,
            }
        )
    return rows


class _Watch:
    """Hooks that time the ``modules`` by name, and count the bytes that they touch."""

    def __init__(self, modules: Mapping[str, nn.Module], stack: ExitStack) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.series: dict[str, list[float]] = defaultdict(list)
        self.traffic: dict[str, int] = defaultdict(int)
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(self._before(name)).remove)
            stack.callback(module.register_forward_hook(self._after(name), with_kwargs=True).remove)

    def begin(self) -> None:
        """A call of the model begins."""
        self.spent.clear()
        self.traffic.clear()

    def note(self) -> None:
        """One call of the model is over."""
        for name, seconds in self.spent.items():
            self.series[name].append(seconds)

    def medians(self) -> dict[str, float]:
        """The seconds that each module took in a call of the model."""
        return {name: median(series) for name, series in self.series.items()}

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.spent[name] -= time.perf_counter()

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.spent[name] += time.perf_counter()
            values = [*flatten(args), *flatten(list(kwargs.values())), *flatten(output)]
            self.traffic[name] += sum(map(_size, values)) + _weights(module, flatten(output))

        return hook


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights(module: nn.Module, outputs: Any) -> int:
    """The bytes of a layer's tensors; of a table, those of the rows that were looked up."""
    held = sum(map(_size, {id(t): t for t in _tensors(module)}.values()))
    if not isinstance(module, QLayer) or module.has_vectors:
        return held
    columns = module.weight_size[-1]
    rows = sum(t.numel() for t in outputs) // columns
    return held * min(rows, module.weight_size[0]) // module.weight_size[0]


def _tensors(module: nn.Module) -> list[Tensor]:
    own = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in own if tensor is not None]


def _fastest(function: Callable[[], object]) -> float:
    """The least seconds of a few calls."""
    function()
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _fastest(lambda: target.copy_(source))


def _products() -> float:
    """Multiply-adds per second of a large fp32 product."""
    a, b = (torch.rand(PRODUCT, PRODUCT) for _ in range(2))
    return PRODUCT**3 / _fastest(lambda: a @ b)
