"""``cluster``: weight sharing by k-means, with the shared values trained, as quantized layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qkit.errors import UsageError
from qkit.flows.evaluate import (
    AnyInputs,
    as_inputs,
    blank_report,
    fill_comparison,
    fill_cost,
    fill_size,
    tensor_bytes,
)
from qkit.flows.ptq import (
    Plan,
    Progress,
    check_tensors,
    copied,
    no_progress,
    opened,
    plan_layers,
)
from qkit.flows.rate import entropy_bits
from qkit.flows.rows import left_row, notes, quantized_row, tied_row
from qkit.models import infer
from qkit.nn import QUANTIZED, QLayer, open_modules, swap
from qkit.nn.clustered import cluster_weight, share_clusters, to_codebook
from qkit.nn.computed import settled
from qkit.numerics import QTensor, check_finite
from qkit.packing.store import join
from qkit.report import LayerRow, Report, tensor_sqnr_db
from qkit.spec import Codebook, PerTensor, QSpec, Recipe, Scheme

Tune = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Clusters:
    """A model whose weights are clustered and can be trained (:mod:`qkit.nn.clustered`).

    ``plans`` are what becomes of each module, ``sqnr_db`` how near each clustered weight was to
    the float one.
    """

    model: nn.Module
    entries: int
    plans: list[Plan]
    sqnr_db: Mapping[str, float | None]

    def settle(self) -> tuple[nn.Module, list[LayerRow]]:
        """The model with quantized layers of exactly its present weights, and the rows."""
        layers: dict[str, QLayer] = {}
        rows: dict[str, LayerRow] = {}
        for plan in self.plans:
            entry = plan.entry
            if plan.rule is None:
                rows[entry.name] = left_row(entry, plan.reason)
                continue
            layer: Any = settled(self.model.get_submodule(entry.name))
            kind = QUANTIZED[type(layer)]
            if entry.tied_to is not None:
                layers[entry.name] = kind(layer, layers[entry.tied_to].spec)
                layers[entry.name].share_weight(layers[entry.tied_to])
                first = rows[entry.tied_to]
                rows[entry.name] = tied_row(entry, first.scheme, first)
                continue
            check_finite(layer.weight, join(entry.name, "weight"))
            q = to_codebook(layer, kind, label=label(self.entries))
            layers[entry.name] = kind.from_float(layer, q)
            rows[entry.name] = quantized_row(
                entry,
                label(self.entries),
                "kmeans",
                q.bits_per_weight,
                self.sqnr_db[entry.name],
                notes(entry.note, _spread(q)),
            )
        return swap(self.model, layers), list(rows.values())


def label(entries: int) -> str:
    """The name of the scheme: at most so many values a weight."""
    return f"kmeans-{entries}"


def _spread(q: QTensor) -> str:
    book = q.spec.format
    assert isinstance(book, Codebook)
    text = f"{len(book.entries)} values, {entropy_bits(q.codes):.2f} bits of entropy"
    if 0.0 not in book.entries:
        return text
    zeros = (q.codes == book.entries.index(0.0)).double().mean()
    return f"{text}, {float(zeros):.1%} zero"


def start_clusters(
    model: nn.Module,
    entries: int = 16,
    *,
    ignore: Sequence[str] = (),
    importance: Mapping[str, Tensor] | None = None,
    in_place: bool = False,
    progress: Progress = no_progress,
) -> Clusters:
    """Cluster the weight of every layer to at most ``entries`` values (2 to 256), ready to train.

    Weights that are exactly zero keep an entry of their own. ``importance`` has, for the names of
    weights, how much each value's error counts. Raises what :func:`qkit.quantize` raises.
    """
    if not 2 <= entries <= 256:
        raise UsageError("weights are clustered to 2 to 256 values", got=entries)
    placeholder = Codebook(label(entries), tuple(range(entries)))
    recipe = Recipe.simple(Scheme(QSpec(placeholder, PerTensor())), ignore)
    plans = plan_layers(model, recipe)
    check_tensors(model)
    model = open_modules(model if in_place else copied(model, []), opened(plans))
    chosen = [plan.entry for plan in plans if plan.rule is not None]
    if unknown := set(importance or ()) - {join(entry.name, "weight") for entry in chosen}:
        raise UsageError("an importance is of a weight that is clustered", got=min(unknown))
    sqnr: dict[str, float | None] = {}
    for done, entry in enumerate(chosen):
        progress(done, len(chosen), entry.name)
        module: Any = model.get_submodule(entry.name)
        if entry.tied_to is not None:
            share_clusters(module, model.get_submodule(entry.tied_to))
            continue
        name = join(entry.name, "weight")
        before = module.weight.detach().clone()
        cluster_weight(module, entries, (importance or {}).get(name), name=name)
        sqnr[entry.name] = tensor_sqnr_db(before, module.weight.detach())
    progress(len(chosen), len(chosen), "")
    return Clusters(model, entries, plans, sqnr)


def cluster(
    model: nn.Module,
    entries: int = 16,
    *,
    ignore: Sequence[str] = (),
    tune: Tune | None = None,
    inputs: AnyInputs | None = None,
    importance: Mapping[str, Tensor] | None = None,
    in_place: bool = False,
    latency: bool = True,
    progress: Progress = no_progress,
) -> tuple[nn.Module, Report]:
    """``model`` with at most ``entries`` different values in each weight, and the report.

    ``tune(model)`` is called with a trainable model, whose shared values are its parameters, and
    may train it in any way. Biases and what is left in float train too. ``importance`` weighs the
    errors of a weight's values (by name), ``inputs`` are what :func:`qkit.quantize` takes. A weight
    that is zero stays zero and costs next to nothing in a coded file (:func:`qkit.save_coded`).
    """
    start = time.perf_counter()
    found = infer(model) if inputs is None else as_inputs(inputs)
    before = tensor_bytes(model.state_dict())
    clusters = start_clusters(
        model,
        entries,
        ignore=ignore,
        importance=importance,
        in_place=in_place,
        progress=progress,
    )
    if tune is not None:
        tune(clusters.model)
    qmodel, rows = clusters.settle()
    name = label(entries)
    report = blank_report(
        name,
        f"{name}: at most {entries} values in each weight, the optimum of k-means"
        + (", then trained" if tune else ""),
        "torch",
        {"version": 1, "steps": [{"cluster": {"entries": entries, "ignore": list(ignore)}}]},
        rows,
    )
    fill_size(report, before, tensor_bytes(qmodel.state_dict()))
    fill_comparison(report, model, qmodel, None if in_place else found, latency=latency)
    fill_cost(report, start)
    return qmodel, report
