"""Rows that differ in size, in front of kernels that take one range for all at each call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qkit.graph import Dialect, Site
from qkit.graph.rows import even_rows
from qkit.graph.sites import when
from qkit.models import Inputs
from qkit.numerics import choose_qparams, fake_quantize
from qkit.spec import PerToken, QSpec

# Rows have a size of their own where that wins so much, and one range does not give enough.
ENOUGH_DB, WORTH_DB = 39.5, 3.0


def uneven_rows(
    module: fx.GraphModule, sites: Sequence[Site], dialect: Dialect, example: Inputs
) -> list[str]:
    """Even the rows of the layers with ranges taken at each call whose rows differ too much in size
    for one range (:mod:`qkit.graph.rows`), as the ``example`` has them; remarks."""
    from qkit.graph.simulate import Simulated

    linear = [s for s in sites if s.kind == "Linear" and s.scheme and when(s.scheme) == "dynamic"]
    if dialect.by_row or not linear:
        return []
    spec = dialect.input_spec("dynamic")
    levels: dict[str, tuple[float, float]] = {}

    def see(node: fx.Node, args: Any, value: Any) -> Any:
        rows = args[0].reshape(-1, args[0].shape[-1])
        levels[node.name] = _level(rows, spec), _level(rows, replace(spec, granularity=PerToken()))
        return value

    with torch.no_grad():
        program = Simulated(module, [site.node.name for site in linear], see)
        program.forward(example.args, example.kwargs)

    def uneven(site: Site) -> bool:
        whole, each = levels[site.node.name]
        return whole < ENOUGH_DB and each > whole + WORTH_DB

    chosen = [site for site in linear if uneven(site)]
    if not chosen:
        return []
    even_rows(module, [site.node for site in chosen])
    names = ", ".join(site.owner for site in chosen)
    return [
        f"the rows of {len(chosen)} inputs differ too much in size for one range: they are "
        f"divided by their greatest magnitudes first ({names})"
    ]


def _level(rows: Tensor, spec: QSpec) -> float:
    """The SQNR of rounding, of which each of the ``rows`` has the same share."""
    rounded = fake_quantize(rows, choose_qparams(rows, spec), spec)
    signal = rows.double().square().sum(1)
    noise = (rounded - rows).double().square().sum(1)
    share = (noise / signal)[signal > 0].mean()  # NaN for rows of zeros
    return -10 * math.log10(share) if share > 0 else math.inf
