"""What a pruning run measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.report.text import as_text

FORMAT = 1


@dataclass(frozen=True)
class GroupRow:
    """One group of units that can be removed: ``kept`` of ``units``, of ``rows`` rows each."""

    name: str
    units: int
    kept: int
    rows: int


@dataclass
class PruneReport:
    """The figures of one run. ``to_json`` has exactly the keys of the fields below.

    ``before`` and ``after`` macs (multiply-adds of one call on the inputs), params, bytes (of all
    tensors); ``ratio`` is after / before of each
    ``latency_ms`` before and after {median, p10, p90, repeats}, speedup, threads, runtime
    ``error`` sqnr_db, cosine, max_abs of the outputs against the model before, inputs
    ``size_bytes`` source, artifact (its weights file), ratio, folder (all files)
    ``history`` of an iterative run: step, removed, metric, good
    ``verification`` as in :class:`qkit.report.Report`
    """

    scheme: str
    recipe: dict[str, Any]
    groups: list[GroupRow] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """This report as plain data."""
        return {"format": FORMAT, "kind": "pruning"} | asdict(self)

    def dumps(self) -> str:
        """This report as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())
