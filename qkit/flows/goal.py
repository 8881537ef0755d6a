"""``--goal-sqnr``: int8 but for the layers that cost most, as many as the output needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from qkit.flows.data import Data
from qkit.flows.per_layer import SAMPLES, GraphModel, per_layer
from qkit.flows.pt2e import prepare
from qkit.flows.treat import harmless
from qkit.spec import Recipe, Rule

# The list is found on a few samples, the goal is held to on more: it is aimed a little higher.
MARGIN_DB = 0.5


def reach(
    model: nn.Module, recipe: Recipe, data: Data, goal: float, **given: Any
) -> tuple[Recipe, list[str]]:
    """``recipe`` with the layers left in float that it takes to ``goal`` decibels, and remarks.

    ``given`` are the keywords of :func:`qkit.flows.pt2e.prepare`. The list is that of
    :func:`qkit.flows.per_layer.per_layer`: the layers that cost most alone, their gain measured
    together, at most a quarter of all.
    """
    prepared = prepare(model, harmless(recipe), data, **given)
    inputs = data.first() if prepared.captured.shapes is None else data.head(SAMPLES)
    found = per_layer(GraphModel(prepared, inputs), data.origin, goal=goal + MARGIN_DB)
    before = found.output.sqnr_db
    if not found.skip or before is None:
        return recipe, []
    left = tuple(Rule(name, None) for name in found.skip)
    told = (
        f"{len(left)} of {len(found.layers)} layers stay in float for --goal-sqnr {goal:g}: "
        f"{', '.join(found.skip)} (SQNR of {SAMPLES} samples {before:.1f} dB without)"
    )
    return replace(recipe, rules=left + recipe.rules), [told]
