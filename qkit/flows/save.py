"""Writing an artifact: stage, verify in a fresh process, then rename into place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qkit.errors import BudgetError, CoverageError, UsageError
from qkit.flows.check import layer_outputs, model_check
from qkit.flows.evaluate import (
    AnyInputs,
    Sized,
    as_inputs,
    eval_mode,
    fill_cost,
    fill_size,
    for_dtype,
)
from qkit.flows.verify import verify
from qkit.models import Inputs, Loaded, Source
from qkit.nn import QLayer
from qkit.nn.factorized import Factorized
from qkit.pruning.surgery import edits_of
from qkit.report import Report, versions
from qkit.targets.artifact import (
    CHECK,
    CONFIG,
    PROGRAM,
    REPORT,
    Artifact,
    read_artifact,
    write_meta,
)
from qkit.targets.program import write_program
from qkit.targets.staging import staged
from qkit.targets.torch import copy_config
from qkit.targets.weights import named_tensors, save_tensors, write_weights


def save(
    qmodel: nn.Module,
    path: str | Path,
    *,
    report: Outcome | None = None,
    inputs: AnyInputs | None = None,
    source: Source | None = None,
    builder: dict[str, Any] | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
    start: float | None = None,
) -> Artifact:
    """Write the quantized or pruned ``qmodel`` as an artifact; it appears only once it is verified.

    ``report`` (of ``quantize`` or ``prune``) is completed with sizes and the verification and
    stored too. With ``inputs``, the outputs of the whole model are checked and a ``torch.export``
    program is written; without, or where there can be no program and nothing else rebuilds the
    model, each quantized layer by itself. ``source`` and ``builder`` say where the model came from
    and how its architecture is rebuilt (:mod:`qkit.models`). The report's seconds count from
    ``start`` (of ``time.perf_counter``) if it is given.

    Raises :class:`~qkit.errors.UsageError` if ``path`` exists,
    :class:`~qkit.errors.OutputError` if it cannot be written and
    :class:`~qkit.errors.VerificationError` if the fresh process disagrees; then there is no
    artifact at ``path``.
    """
    quantized = any(isinstance(m, QLayer | Factorized) for m in qmodel.modules())
    if report is None and not quantized and not edits_of(qmodel):
        raise UsageError(
            "the model has no quantized layers, and was neither pruned nor factorized",
            fix="qkit.quantize(model, scheme), or qkit.prune(model, inputs)",
        )
    out = Path(path)
    with staged(out, overwrite=overwrite) as folder, eval_mode(qmodel):
        meta = head(report, source, builder) | write_weights(qmodel, folder)
        if source and source.kind == "hf-folder" and report:
            copy_config(Path(source.path), folder)
        remark = None
        if inputs is not None:
            inputs = for_dtype(as_inputs(inputs), qmodel)
            save_tensors(model_check(qmodel, inputs), folder / CHECK)
            remark = write_program(qmodel, inputs, folder / PROGRAM)
        if inputs is None or (remark and builder is None and source is None):
            # A fresh process knows nothing that it could run as a whole.
            tensors = named_tensors(qmodel)
            save_tensors(layer_outputs(Artifact(folder, meta), tensors), folder / CHECK)
        write_meta(folder, meta)
        result = verify(
            folder,
            model=(builder or {}).get("factory"),
            # The fresh process takes the architecture from the file that was quantized.
            source=source.path if source and builder is None and inputs is not None else None,
            trust_pickle=trust_pickle,
        )
        if report is not None:
            if remark:
                report.remarks.append(f"no program.pt2: {remark}")
            complete(report, result, folder, source, out, start)
    return read_artifact(out)


class Outcome(Sized, Protocol):
    """A report that is stored with its artifact."""

    scheme: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    artifact: str | None
    verification: dict[str, Any]
    remarks: list[str]

    def dumps(self) -> str:
        """The report as JSON text."""


def head(
    report: Outcome | None,
    source: Source | None,
    builder: dict[str, Any] | None,
    *,
    target: str = "torch",
) -> dict[str, Any]:
    """What ``qkit.json`` says about the run."""
    return {
        "target": target,
        "scheme": report.scheme if report else None,
        "recipe": report.recipe if report else None,
        "builder": builder,
        "source": source and {"kind": source.kind, "files": source.files},
        "versions": {k: v for k, v in versions().items() if k in ("qkit", "torch")},
    }


def write_report(report: Outcome, folder: Path) -> None:
    """Write the report, which counts its own bytes too."""
    others = sum(path.stat().st_size for path in folder.iterdir())
    text = ""
    while report.size_bytes.get("folder") != others + len(text.encode()):
        report.size_bytes["folder"] = others + len(text.encode())
        text = report.dumps()
    (folder / REPORT).write_text(text, encoding="utf-8")


def fill_files(report: Outcome, source: Source | None, artifact: int, out: Path) -> None:
    """Where the artifact ``out`` is and of how many bytes, what it was made from, and their ratio.

    Of a source that is a folder, the configuration does not count.
    """
    if source is None:
        before = report.size_bytes["source"]
    else:
        report.source = {"path": Path(source.path).name, "kind": source.kind, "files": source.files}
        before = sum(f["bytes"] for name, f in source.files.items() if name != CONFIG)
    fill_size(report, before, artifact)
    report.artifact = str(out)


def complete(
    report: Outcome,
    result: dict[str, Any],
    folder: Path,
    source: Source | None,
    out: Path,
    start: float | None,
) -> None:
    """Fill in what is known once the artifact in ``folder`` is verified; write the report there."""
    report.verification = result
    weights = read_artifact(folder).weights
    fill_files(report, source, sum(path.stat().st_size for path in weights), out)
    if start is not None:
        fill_cost(report, start)
    write_report(report, folder)


def check_budgets(
    report: Report, *, min_coverage: float = 0.0, min_sqnr: float | None = None
) -> None:
    """Raise :class:`~qkit.errors.BudgetError` (or CoverageError) if a limit is missed."""
    if report.coverage["fraction"] < min_coverage:
        raise CoverageError(
            "too little of the model was quantized",
            got=f"{report.coverage['fraction']:.1%} of its parameters",
            wanted=f"at least {min_coverage:.1%}",
            fix="the report's rows say why each layer was left",
        )
    sqnr = report.error.get("sqnr_db")
    if min_sqnr is not None and sqnr is not None and sqnr < min_sqnr:
        raise BudgetError(
            "the quantized model is too far from the float one",
            got=f"SQNR {sqnr:.1f} dB",
            wanted=f"at least {min_sqnr:g} dB",
            fix="more bits, smaller groups, or --ignore the worst layers of the report",
        )


class Written(Protocol):
    """The options of a command that say whether and how a model is written."""

    @property
    def dry_run(self) -> bool: ...  # noqa: D102
    @property
    def trust_pickle(self) -> bool: ...  # noqa: D102
    @property
    def overwrite(self) -> bool: ...  # noqa: D102


def deliver(
    model: nn.Module,
    report: Outcome,
    request: Written,
    out: Path,
    loaded: Loaded,
    inputs: Inputs | None,
    told: Callable[[str], None],
    start: float,
) -> None:
    """Write what a command made of ``loaded`` to ``out`` (:func:`save`), unless it
    is a dry run."""
    report.remarks += loaded.source.notes
    if request.dry_run:
        report.remarks.append("dry run: nothing was written")
        return
    told(f"writing {out} and verifying it in a fresh process")
    save(
        model,
        out,
        report=report,
        inputs=inputs,
        source=loaded.source,
        builder=loaded.builder,
        trust_pickle=request.trust_pickle,
        overwrite=request.overwrite,
        start=start,
    )
