"""What a run measured: one type for the command line, the library, tests and benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.errors import InputError
from qkit.report.text import as_text

FORMAT = 1


@dataclass(frozen=True)
class LayerRow:
    """One module that owns parameters.

    ``scheme`` is None where it was left in float, and then ``reason`` says why; else
    ``algorithm`` says how the codes were found. ``bits_per_weight`` counts codes, scales and zero
    points; ``sqnr_db`` is the weight's (None where exact or left). ``note`` is for what else a
    reader should know, such as a tie.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    scheme: str | None = None
    reason: str | None = None
    algorithm: str | None = None
    bits_per_weight: float | None = None
    sqnr_db: float | None = None
    note: str | None = None


@dataclass
class Report:
    """The figures of one run. ``to_json`` has exactly the keys of the fields below.

    * ``coverage``: parameters, quantized_parameters, fraction, layers_quantized, layers_left;
      ``done`` where it is something else than "quantized"; of a target of PT2E integer_layers that
      its runtime runs, and integer_layers_expected
    * ``size_bytes``: source, artifact (its weights file), ratio, folder (all files)
    * ``error``: sqnr_db, cosine, max_abs against the float model, level (model or weights), inputs
    * ``latency_ms``: float and quantized {median, p10, p90, repeats}, speedup, threads
    * ``kernels``: implementation -> calls in one forward pass (counted, not assumed)
    * ``verification``: status, level, runtime, fresh_process, checks
    * ``calibration``: samples, activations (:class:`~qkit.report.ActivationRow`), where asked for
    * ``training``: how a quantized model was trained, and its figures after each epoch
    * ``remarks``: plain sentences: what is not faster and why, what was assumed
    * ``details``: where a document was asked for: histograms of the least exact weights
      (:class:`~qkit.report.Distribution`), times of the layers beside the roofline, bytes of the
      layers and of the files
    """

    scheme: str
    scheme_long: str
    target: str
    layers: list[LayerRow] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """This report as plain data."""
        return {"format": FORMAT} | asdict(self)

    def dumps(self) -> str:
        """This report as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The report that :meth:`to_json` described."""
        if data.get("format") != FORMAT:
            raise InputError("unknown report format", got=data.get("format"), wanted=FORMAT)
        fields = {key: value for key, value in data.items() if key != "format"}
        return Report(layers=[row_from_json(row) for row in fields.pop("layers")], **fields)


def row_from_json(data: dict[str, Any]) -> LayerRow:
    """The row that JSON holds as the object of its fields."""
    return LayerRow(**data | {"shape": tuple(data["shape"])})


def coverage(rows: list[LayerRow]) -> dict[str, Any]:
    """How much of a model was quantized, from its rows."""
    total = sum(row.parameters for row in rows)
    done = [row for row in rows if row.scheme is not None]
    quantized = sum(row.parameters for row in done)
    return {
        "parameters": total,
        "quantized_parameters": quantized,
        "fraction": round(quantized / total, 6) if total else 0.0,
        "layers_quantized": len(done),
        "layers_left": len(rows) - len(done),
    }
