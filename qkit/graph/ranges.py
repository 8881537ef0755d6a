"""The ranges that a prepared PT2E module has learnt, beside what it saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx

from qkit.graph.kinds import kind_of, owner_of
from qkit.graph.observe import PerChannelRange
from qkit.numerics import QParams, dequantize, quantize
from qkit.numerics.histogram import Histogram
from qkit.report import ActivationRow, Distribution, sqnr_db
from qkit.report.distribution import distribution, least_exact

# The share of values that outliers are measured against.
USUAL = 0.999


def activation_observers(prepared: fx.GraphModule) -> Iterator[tuple[fx.Node, PerChannelRange]]:
    """Each of qkit's observers of an activation with a learnt range, once, and what it watches."""
    seen = set()
    for node in prepared.graph.nodes:
        if node.op != "call_module" or not isinstance(node.args[0], fx.Node):
            continue
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, PerChannelRange) and module.observer.spec.when == "static":
            if id(module) not in seen:
                yield node.args[0], module
            seen.add(id(module))


def watch_activations(prepared: fx.GraphModule) -> None:
    """Let the observers keep the distribution of what they see, for :func:`activation_rows`."""
    for _, module in activation_observers(prepared):
        module.watch()


def activation_rows(prepared: fx.GraphModule) -> list[ActivationRow]:
    """A row for each activation, in order, once the data have been run."""
    seen = [
        (_name(source), module, values)
        for source, module in activation_observers(prepared)
        if (values := module.distribution) is not None
    ]
    rows = [_row(*each) for each in seen]
    for place in least_exact([row.sqnr_db for row in rows]):
        rows[place] = replace(rows[place], distribution=_distribution(*seen[place]))
    return rows


def _name(source: fx.Node) -> str:
    """The module whose forward made a value and the operator, or the input's name."""
    if source.op == "placeholder":
        return f"input {source.target}"
    kind = kind_of(source)
    owner = owner_of(source)[0]
    what = kind.name if kind else source.name
    return f"{owner} ({what})" if owner else what


def _rounded(values: Tensor, module: PerChannelRange) -> Tensor:
    """What the learnt range makes of ``values``."""
    scale, zero_point = module.calculate_qparams()
    spec = module.observer.spec
    params = QParams(scale.reshape(()), None if spec.symmetric else zero_point.reshape(()))
    return dequantize(quantize(values, params, spec), torch.float64)


def _distribution(name: str, module: PerChannelRange, seen: Histogram) -> Distribution:
    scale, zero_point = module.calculate_qparams()
    values, counts = seen.channel(0)
    before, after = (x / scale + zero_point for x in (values, _rounded(values, module)))
    levels = torch.arange(module.quant_min, module.quant_max + 1, dtype=torch.float64)
    return distribution(name, module.observer.spec.describe(), before, after, levels, counts)


def _row(name: str, module: PerChannelRange, seen: Histogram) -> ActivationRow:
    scale, zero_point = module.calculate_qparams()
    values, counts = seen.channel(0)
    rounded = _rounded(values, module)
    reach = [float((code - zero_point) * scale) for code in (module.quant_min, module.quant_max)]
    half = float(scale) / 2
    outside = (values < reach[0] - half) | (values > reach[1] + half)
    return ActivationRow(
        name=name,
        seen=(float(seen.lo[0]), float(seen.hi[0])),
        range=(reach[0], reach[1]),
        clipped=float(counts[outside].sum() / counts.sum()),
        outliers=_outliers(values, counts),
        sqnr_db=sqnr_db(
            float((values.square() * counts).sum()),
            float(((rounded - values).square() * counts).sum()),
        ),
    )


def _outliers(values: Tensor, counts: Tensor) -> float:
    """The largest magnitude over the one that :data:`USUAL` of the values stay below."""
    sizes, order = values.abs().sort()
    below = counts[order].cumsum(0)
    usual = sizes[(below >= USUAL * below[-1]).long().argmax()]
    return float(sizes[-1] / usual) if usual > 0 else 1.0
