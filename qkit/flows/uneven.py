"""Rows and columns that differ in size, beside kernels that take one range for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qkit.flows.data import Data
from qkit.flows.treat import magnitudes
from qkit.graph import Dialect, Site
from qkit.graph.columns import even_columns
from qkit.graph.kinds import kind_of, uses_of
from qkit.graph.rows import LEAST, even_rows
from qkit.graph.sites import when
from qkit.models import Inputs, flatten
from qkit.numerics import choose_qparams, fake_quantize
from qkit.report import compare
from qkit.spec import PerChannel, PerToken, QSpec, Recipe

# Rows and columns have a size of their own where that wins so much, and one range does not give
# enough.
ENOUGH_DB, WORTH_DB = 39.5, 3.0
# What a model must keep of its outputs with ranges taken at each call; where it does not, rows have
# a size of their own where that wins anything.
KEPT_DB, ANYTHING_DB = 30.5, 0.5

# The SQNR of rounding with one range, and with one for each row.
_Levels = Mapping[str, tuple[float, float]]


def uneven_rows(
    module: fx.GraphModule, sites: Sequence[Site], dialect: Dialect, example: Inputs
) -> list[str]:
    """Even the rows of the layers with ranges taken at each call whose rows differ too much in size
    for one range (:mod:`qkit.graph.rows`), as the ``example`` has them; remarks."""
    linear = [s for s in sites if s.kind == "Linear" and s.scheme and when(s.scheme) == "dynamic"]
    if dialect.by_row or not linear:
        return []
    spec = dialect.input_spec("dynamic")
    levels: dict[str, tuple[float, float]] = {}

    def see(node: fx.Node, args: Any, value: Any) -> Any:
        levels[node.name] = _levels(args[0], spec)
        return value

    wanted = _run(module, linear, see, example)
    chosen, why = _worth(linear, levels, WORTH_DB, ENOUGH_DB), "differ too much in size"
    more = _worth(linear, levels, ANYTHING_DB)
    if len(more) > len(chosen):
        got = _run(module, linear, _rounding(linear, {s.node.name for s in chosen}, spec), example)
        kept = compare(wanted, got).sqnr_db
        if kept is not None and kept < KEPT_DB:
            chosen, why = more, f"differ in size (the outputs keep {kept:.1f} dB, which is little)"
    if not chosen:
        return []
    even_rows(module, [site.node for site in chosen])
    return [
        f"the rows of {len(chosen)} inputs {why} for one range: they are divided by their "
        f"greatest magnitudes first ({_named(chosen)})"
    ]


def uneven_columns(
    module: fx.GraphModule, sites: Sequence[Site], recipe: Recipe, dialect: Dialect, data: Data
) -> list[str]:
    """Even the columns of the linear layers whose output is rounded because the kernel gives codes,
    and then read as floats, where they differ too much in size for one range, as the first batch
    has them (:mod:`qkit.graph.columns`); remarks."""
    from qkit.graph.annotate import integer_nodes

    if "Linear" not in dialect.always:
        return []
    integer, uses = integer_nodes(module, sites, recipe, dialect), uses_of(module)
    linear = [site for site in sites if _gives_floats(site, integer) and _alone(site, uses)]
    if not linear:
        return []
    spec, levels = dialect.input_spec("static"), {}

    def see(node: fx.Node, args: Any, value: Any) -> Any:
        levels[node.name] = _levels(value.reshape(-1, value.shape[-1]).T, spec)
        return value

    _run(module, linear, see, data.first())
    chosen = _worth(linear, levels, WORTH_DB, ENOUGH_DB)
    if not chosen:
        return []
    last = {site.node: site.node.meta["val"].dim() - 1 for site in chosen}
    even_columns(module, magnitudes(module, last, data))
    return [
        f"the columns of {len(chosen)} outputs differ too much in size for one range: they are "
        f"multiplied by what they reach behind it ({_named(chosen)})"
    ]


def _worth(
    sites: Iterable[Site], levels: _Levels, least: float, enough: float = math.inf
) -> list[Site]:
    """Those that win ``least`` decibels by ranges of their own, and do not have ``enough``."""
    found = [(site, *levels[site.node.name]) for site in sites]
    return [site for site, whole, each in found if whole < enough and each > whole + least]


def _named(sites: Iterable[Site]) -> str:
    return ", ".join(site.owner for site in sites)


def _run(
    module: fx.GraphModule, sites: Iterable[Site], see: Callable[..., Any], example: Inputs
) -> list[Tensor]:
    """The outputs of ``module``, whose ``sites`` are shown to ``see``."""
    from qkit.graph.simulate import Simulated

    with torch.no_grad():
        program = Simulated(module, [site.node.name for site in sites], see)
        return list(flatten(program.forward(example.args, example.kwargs)))


def _rounding(sites: Iterable[Site], even: Collection[str], spec: QSpec) -> Callable[..., Any]:
    """What computes linear layers with weights and inputs rounded, those of the nodes ``even`` with
    rows of one size."""
    schemes = {site.node.name: site.scheme for site in sites}

    def see(node: fx.Node, args: Any, value: Any) -> Any:
        x, weight, *bias = args
        scheme = schemes[node.name]
        assert scheme is not None
        size = x.abs().amax(-1, keepdim=True).clamp_min(LEAST) if node.name in even else 1.0
        x = _rounded(x / size, spec) * size
        return F.linear(x, _rounded(weight, scheme.weight), *bias)

    return see


def _gives_floats(site: Site, integer: Collection[fx.Node]) -> bool:
    """Whether a linear layer has learnt ranges, and its output is read by none of the ``integer``
    nodes but such as move codes."""

    def read_as_floats(node: fx.Node) -> bool:
        for user in node.users:
            kind = kind_of(user)
            moves = kind is not None and kind.role == "same"
            if user in integer and not (moves and read_as_floats(user)):
                return False
            if user.target is torch.ops.aten.batch_norm.default:  # which is folded into the layer
                return False
        return True

    return site.static and site.kind == "Linear" and read_as_floats(site.node)


def _alone(site: Site, uses: Mapping[str, int]) -> bool:
    """Whether nothing else reads the parameters of a layer, whose weight has a scale for each
    column of the output."""
    assert site.scheme is not None
    names = [str(each.target) for each in site.node.all_input_nodes if each.op == "get_attr"]
    return site.scheme.weight.granularity == PerChannel(0) and all(uses[n] == 1 for n in names)


def _levels(x: Tensor, spec: QSpec) -> tuple[float, float]:
    rows = x.reshape(-1, x.shape[-1])
    return _level(rows, spec), _level(rows, replace(spec, granularity=PerToken()))


def _level(rows: Tensor, spec: QSpec) -> float:
    """The SQNR of rounding, of which each of the ``rows`` has the same share."""
    signal = rows.double().square().sum(1)
    noise = (_rounded(rows, spec) - rows).double().square().sum(1)
    share = (noise / signal)[signal > 0].mean()  # NaN for rows of zeros
    return -10 * math.log10(share) if share > 0 else math.inf


def _rounded(x: Tensor, spec: QSpec) -> Tensor:
    return fake_quantize(x, choose_qparams(x, spec), spec)
