"""What a report document shows besides the report: histograms of weights, times of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor, nn

from qkit.flows.layer_times import layer_times
from qkit.models import Inputs
from qkit.nn import QLayer, survey
from qkit.numerics import QParams, dequantize
from qkit.report import Distribution, LayerRow, Report
from qkit.report.distribution import distribution, in_steps, least_exact, levels_of
from qkit.spec import QSpec


def fill_details(
    report: Report, model: nn.Module, qmodel: nn.Module, inputs: Inputs | None, *, latency: bool
) -> None:
    """Histograms of the least exact weights and, with ``inputs`` and ``latency``, times of the
    quantized layers of ``qmodel``, made from ``model``."""
    found = weight_distributions(model, qmodel, report.layers)
    report.details["histograms"] = [asdict(each) for each in found]
    if inputs is not None and latency:
        report.details["times"] = layer_times(model, qmodel, inputs)


def weight_distributions(
    model: nn.Module, qmodel: nn.Module, rows: list[LayerRow]
) -> Iterator[Distribution]:
    """Those of the quantized layers with the lowest SQNR, one in memory at a time."""
    floats = {entry.name: entry for entry in survey(model)}
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QLayer)}
    # A layer that is tied to another has the same weight, and a cast has no grid to show.
    rows = [row for row in rows if row.name in layers and row.name in floats]
    rows = [row for row in rows if not layers[row.name].spec.is_cast]
    rows = [row for row in rows if floats[row.name].tied_to is None]
    for place in least_exact([row.sqnr_db for row in rows]):
        name = rows[place].name
        layer = layers[name]
        before = layer.rows(floats[name].module).detach().flatten(1)
        q = layer.qtensor()
        yield weight_distribution(name, before, dequantize(q), q.qparams, q.spec)


def weight_distribution(
    name: str, before: Tensor, after: Tensor, qparams: QParams, spec: QSpec
) -> Distribution:
    """That of a weight ``before`` and ``after`` it was rounded with ``qparams``."""
    x, rounded = (in_steps(weight, qparams, spec) for weight in (before, after))
    return distribution(name, spec.describe(), x, rounded, levels_of(spec))
