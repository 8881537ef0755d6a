"""Calibration: run the float model on real data and learn what each layer's inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qkit.algorithms import Stats
from qkit.errors import InputError
from qkit.flows.evaluate import eval_mode
from qkit.models import Inputs, batches, run
from qkit.nn import QUANTIZED
from qkit.numerics import OBSERVERS, Observer, QParams, qparams_from_range
from qkit.spec import QSpec

# Samples that are run at a time; the statistics do not depend on it.
BATCH = 8
# Bytes of statistics that are gathered in one pass over the data; large models take several.
PASS_BYTES = 1 << 30
# transformers' name for "which positions of [batch, length] are real".
MASK = "attention_mask"


def passes(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """The names of ``layers``, cut so that the statistics of each part fit in PASS_BYTES."""
    return parts({name: 4 * int(_empty(layer).moment.numel()) for name, layer in layers.items()})


def parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of ``sizes`` (in bytes), cut so that each part fits in PASS_BYTES."""
    part: list[str] = []
    used = 0
    for name, size in sizes.items():
        if part and used + size > PASS_BYTES:
            yield part
            part, used = [], 0
        part.append(name)
        used += size
    if part:
        yield part


def _empty(layer: Any) -> Stats:
    rows = QUANTIZED[type(layer)].rows(layer)
    return Stats.empty(getattr(layer, "groups", 1), rows[0].numel())


def collect(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], data: Inputs
) -> dict[str, Stats]:
    """One pass of ``data`` through ``model``: statistics of the inputs of each of ``layers``.

    Each name stands for all modules that use one weight. Positions that an ``attention_mask``
    hides are not counted, because the model's answer does not depend on them.
    """
    stats = {name: _empty(modules[0]) for name, modules in layers.items()}

    def learn(name: str, module: nn.Module, x: Tensor) -> None:
        stats[name].update(QUANTIZED[type(module)].input_vectors(module, x))

    _watch(model, layers, data, learn)
    return stats


def input_qparams(model: nn.Module, specs: Mapping[str, QSpec], data: Inputs) -> dict[str, QParams]:
    """Scale and zero point of the inputs of the layers ``specs``, from one pass of ``data``.

    Their range is that of the data (``minmax``). Raises :class:`~qkit.errors.InputError` for a
    layer that the data never reached.
    """
    observers = {
        name: Observer(OBSERVERS["minmax"](), spec, f"the input of {name}")
        for name, spec in specs.items()
    }

    def learn(name: str, module: nn.Module, x: Tensor) -> None:
        observers[name].update(x)

    _watch(model, {name: [model.get_submodule(name)] for name in specs}, data, learn)
    if unseen := [name for name, observer in observers.items() if observer.state is None]:
        raise InputError(
            "the calibration data reached no input of a layer, so its range is not known",
            where=data.origin,
            got=", ".join(unseen[:5]),
            fix="--ignore it, or calibrate with data that use it",
        )
    return {
        name: qparams_from_range(*observer.range(), specs[name], name=observer.name)
        for name, observer in observers.items()
    }


def _watch(
    model: nn.Module,
    layers: Mapping[str, Sequence[nn.Module]],
    data: Inputs,
    learn: Callable[[str, nn.Module, Tensor], None],
) -> None:
    """Run ``data`` through ``model`` and call ``learn`` with every input of each of ``layers``."""
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            if mask is not None and isinstance(module, nn.Linear) and x.shape[:-1] == mask.shape:
                x = x[mask]
            learn(name, module, x)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, modules in layers.items()
        for module in modules
    ]
    try:
        with eval_mode(model):
            for batch in batches(data, BATCH):
                given = batch.kwargs.get(MASK)
                mask = given.bool() if given is not None and given.dim() == 2 else None
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
