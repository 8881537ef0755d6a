"""The steps that a recipe may name: each is a row of :data:`STEPS`, and nothing else knows them."""

from __future__ import annotations

from qkit.flows.compress.fixing import FIXING
from qkit.flows.compress.kinds import StepKind
from qkit.flows.compress.learning import LEARNING
from qkit.flows.compress.lowering import LOWERING
from qkit.flows.compress.shrinking import SHRINKING

STEPS: dict[str, StepKind] = SHRINKING | LEARNING | FIXING | LOWERING
