"""The rows of a model that was quantized for a runtime, and histograms of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from qkit.flows.details import weight_distribution
from qkit.flows.qat import Tuned
from qkit.flows.rows import INDICES, left_row, notes, quantized_row
from qkit.graph import Dialect
from qkit.graph.sites import Site
from qkit.nn import Entry, survey
from qkit.numerics import choose_qparams, fake_quantize
from qkit.report import Distribution, LayerRow, tensor_sqnr_db
from qkit.report.distribution import least_exact
from qkit.spec import Scheme
from qkit.targets.backend import Converted

PT2E = "pt2e"


def lowered_rows(
    model: nn.Module, converted: Converted, dialect: Dialect, tuned: Tuned | None
) -> list[LayerRow]:
    """One row for each module with parameters, by what became of its weight."""
    algorithm = PT2E if tuned is None else "qat"
    rows = []
    for entry, found, weight in _weights(model, converted, tuned):
        if found is None:
            reason = f"{dialect.name} computes {entry.kind} in float"
            if "BatchNorm" in entry.kind:
                reason = "folded into the convolution before it, or computed in float"
            rows.append(left_row(entry, reason))
        elif found.scheme is None:
            rows.append(left_row(entry, found.reason))
        else:
            treated = "+".join(found.algorithms) if found.algorithms != ("rtn",) else algorithm
            rows.append(_row(entry, found, found.scheme, weight, treated))
    return rows


def lowered_distributions(
    model: nn.Module, converted: Converted, tuned: Tuned | None, rows: list[LayerRow]
) -> Iterator[Distribution]:
    """Those of the weights of the ``rows`` with the lowest SQNR, one in memory at a time."""
    names = [rows[place].name for place in least_exact([row.sqnr_db for row in rows])]
    found = {entry.name: (at, w) for entry, at, w in _weights(model, converted, tuned)}
    for name in names:
        site, weight = found[name]
        if site is None or site.scheme is None or weight is None:
            continue
        w, spec = weight.detach(), site.scheme.weight
        qparams = choose_qparams(w, spec)
        yield weight_distribution(name, w, fake_quantize(w, qparams, spec), qparams, spec)


def _weights(
    model: nn.Module, converted: Converted, tuned: Tuned | None
) -> Iterator[tuple[Entry, Site | None, Tensor | None]]:
    """Each module with parameters, what became of its weight, and that weight in float."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    sites: dict[str, Site] = {}
    tables: dict[int, Site] = {}  # by the weight, which other modules may name, too
    for site in converted.sites:
        if site.table:
            tables.setdefault(id(named.get(str(site.weight))), site)
        elif site.weight is not None:
            sites.setdefault(site.weight, site)
            sites.setdefault(site.owner, site)
    trained = {} if tuned is None else tuned.weights
    for entry in survey(model):
        found, weight = _site(entry, sites, tables), None
        if found is not None:
            weight = getattr(entry.module, "weight", named.get(str(found.weight)))
            weight = trained.get(str(found.weight), weight)
        yield entry, found, weight if isinstance(weight, Tensor) else None


def _site(entry: Entry, sites: Mapping[str, Site], tables: Mapping[int, Site]) -> Site | None:
    """What became of the weight of ``entry``; ``sites`` are by weight and by its owner, ``tables``
    by the identity of the weight, which a layer may share."""
    own = [tables[id(p)] for p in entry.module.parameters(recurse=False) if id(p) in tables]
    if isinstance(entry.module, nn.Embedding | nn.EmbeddingBag):
        return next(iter(own), None)
    # The layers of a module that is opened are called as its parameters.
    names = [f"{entry.name}.weight", entry.name, f"{entry.tied_to}.weight", str(entry.tied_to)]
    if found := next((sites[name] for name in names if name in sites), None):
        return found
    whole = sites.get(entry.inside or "")
    if whole is not None and whole.kind == "LSTM":
        return whole
    return next(iter(own), None)  # a parameter of a module's own that is looked up


def _row(
    entry: Entry, site: Site, scheme: Scheme, weight: Tensor | None, algorithm: str
) -> LayerRow:
    """The row of a module with a quantized weight."""
    spec = scheme.weight
    bits, sqnr = float(spec.format.bits), None
    if weight is not None:
        w = weight.detach()
        qparams = choose_qparams(w, spec)
        bits += 32 * qparams.scale.numel() / w.numel()
        if algorithm in (PT2E, "qat"):  # else they are other codes, or of another weight
            sqnr = tensor_sqnr_db(w, fake_quantize(w, qparams, spec))
    note = None if site.kind in (entry.kind, entry.inside_kind) else f"its {site.kind}"
    note = notes(note, INDICES if site.table else None)
    return quantized_row(entry, scheme.name, algorithm, bits, sqnr, note)
