"""What a distillation measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.report.text import as_text

FORMAT = 1


@dataclass
class DistillReport:
    """The figures of one run. ``to_json`` has exactly the keys of the fields below.

    ``metrics`` of teacher and student on the validation data (or the training data), ``before``
    (teacher) and ``after`` (student): params; ``training`` the options, and figures of each epoch
    ``size_bytes`` source, artifact (its weights file), ratio, folder (all files)
    ``verification`` as in :class:`qkit.report.Report`
    """

    scheme: str
    recipe: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
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
        return {"format": FORMAT, "kind": "distillation"} | asdict(self)

    def dumps(self) -> str:
        """This report as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())
