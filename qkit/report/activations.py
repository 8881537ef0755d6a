"""What calibration saw of one activation, and what its range makes of that."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.report.distribution import Distribution


@dataclass(frozen=True)
class ActivationRow:
    """One activation with a learnt range.

    ``name`` is the module (or operator) that gives it. ``seen`` are its least and greatest value,
    ``range`` what the codes reach, ``clipped`` the share of values beyond it by more than half a
    step. ``outliers`` is the largest magnitude over that which 99.9 % of the values stay below: 1
    to 2 is harmless, and at 10 all but one value in a thousand share a tenth of the codes.
    ``sqnr_db`` is that of rounding the values it saw (None: exact). The least exact have their
    ``distribution`` too.
    """

    name: str
    seen: tuple[float, float]
    range: tuple[float, float]
    clipped: float
    outliers: float
    sqnr_db: float | None
    distribution: Distribution | None = None
