"""``qkit quantize`` of checkpoints larger than memory, some rows of one tensor at a time.

Memory holds a block of rows and what it is quantized to, whatever the size of the model. The
layers are those of :func:`qkit.nn.tree`, guessed from names and dimensions; each row has its own
scales (or all have one, which is found first), so its codes are those of the whole weight, and the
weights file is, byte for byte, the one that is written for the same tensors in memory.

A journal in the staging folder says which tensors are written, so that ``--resume`` goes on after
a kill; the artifact is then, byte for byte, the one that the whole run would have written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from qkit.errors import InputError, UsageError
from qkit.flows.choose import obstacle, source_bytes
from qkit.flows.evaluate import fill_weight_error, new_report
from qkit.flows.hashing import hashing
from qkit.flows.pieces import SAMPLE, Pieces
from qkit.flows.ptq import Progress, no_progress
from qkit.flows.quantize import Request, destination, resolve_request
from qkit.flows.save import check_budgets, complete, head
from qkit.flows.threads import finished
from qkit.flows.verify import verify
from qkit.flows.work import Work, plan_work
from qkit.models.architecture import Architecture, architecture_of
from qkit.models.checkpoint import BLOCK, open_checkpoint
from qkit.models.factory import spread
from qkit.models.loaded import Source
from qkit.models.sniff import FOLDER
from qkit.report import LayerRow, Report, coverage, row_from_json, versions
from qkit.targets.artifact import CHECK, write_meta
from qkit.targets.journal import JOURNAL, Journal, read_journal
from qkit.targets.shards import ShardWriter, TensorFile
from qkit.targets.staging import left_behind, staged
from qkit.targets.torch import copy_config

# Of a source of at most this many bytes, the error of every value is measured: it is read soon.
EXACT_BYTES = 1 << 28
NOT_RUN = (
    "streamed: outputs were not compared and nothing was timed; the error is the worst layer's "
    "weight SQNR"
)
SAMPLED = (
    f"the SQNR of a weight is that of a sample, the first rows (about {SAMPLE} values) of every "
    f"{BLOCK} values"
)
# How much work a kill may cost: after this many seconds what was written is put on the disk.
COMMIT_SECONDS = 2.0


def stream_file(
    request: Request,
    *,
    shard_bytes: int | None = None,
    workers: int = 1,
    resume: bool = False,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Quantize the checkpoint ``request.path`` without holding it in memory; return the report.

    ``shard_bytes`` is the greatest size of a file of weights (None: one file); ``workers`` threads
    each quantize one tensor at a time. ``resume`` goes on with what a run for the same output had
    written when it was killed. ``progress`` counts bytes of the source. The artifact is verified
    in a fresh process, which runs every quantized weight from disk; the errors of the rows are
    those of a sample where the source is large (the report says which).

    Raises :class:`~qkit.errors.RequestError` or :class:`~qkit.errors.UsageError`, before anything
    is read, for what needs the model or data and for a killed run that was another one, and what
    :func:`qkit.models.checkpoint` and :func:`qkit.flows.quantize_file` raise; nothing is left at
    the output then.
    """
    start = time.perf_counter()
    scheme, recipe = resolve_request(request)
    if error := obstacle(request, recipe):
        raise error
    out = destination(request, scheme)
    told(scheme.long_form())
    source = open_checkpoint(request.path, trust=request.trust_pickle)
    told(f"opened {request.path}: {source.kind}, {len(source)} tensors")
    known = Architecture()
    if source.kind == FOLDER:
        known = architecture_of(Path(request.path), source.metas)
        source = replace(source, entries=spread(source.entries, known.ties))
    source, work = plan_work(source, scheme, recipe, known.kinds)
    report = new_report(scheme, request.target, recipe, work.expected)
    check_budgets(report, min_coverage=request.min_coverage)
    exact = source_bytes(request.path) <= EXACT_BYTES
    origin: dict[str, Any] = {
        "source": _stamps(source.files),
        "recipe": recipe.to_json(),
        "shard size": shard_bytes,
        "versions": {name: versions().get(name) for name in ("qkit", "torch")},
    }
    resumed = _resumed(out, origin, told) if resume else None
    if not resume and any(read_journal(folder) for folder in left_behind(out)):
        told("a killed run had written a part: --resume would have gone on with it")
    with staged(out, overwrite=request.overwrite, resumed=resumed) as folder:
        again = resumed is not None
        weights = ShardWriter(folder, work.stored, shard_bytes, again=again)
        checks = TensorFile(folder / CHECK, work.checks, again=again)
        pieces = Pieces(source, weights, checks, exact=exact)
        journal = Journal(folder, origin)
        if again:
            told(f"resumed: {len(journal.done)} of {len(work.jobs)} tensors are written already")
        with hashing(source.files, workers, pieces.reached) as facts:
            report.layers = _run(work, pieces, journal, workers, progress)
            about = Source(request.path, source.kind, facts(), source.notes)
        report.coverage = coverage(report.layers)
        fill_weight_error(report, NOT_RUN if exact else f"{NOT_RUN}; {SAMPLED}")
        check_budgets(report, min_sqnr=request.min_sqnr)
        seconds = time.perf_counter() - start
        _check_unchanged(source.files, origin["source"])
        if source.kind == FOLDER:
            copy_config(Path(request.path), folder)
        write_meta(folder, head(report, about, known.builder) | work.facts)
        told(f"verifying {out} in a fresh process")
        result = verify(folder)
        speed = pieces.read_bytes / 1e6 / seconds
        report.remarks += [*source.notes, f"{speed:.0f} MB/s of the source"]
        if known.reason:
            report.remarks.append(f"qkit.load will need into= or --model: {known.reason}")
        journal.remove()
        complete(report, result, folder, about, out, start)
    return report


def _resumed(out: Path, origin: dict[str, Any], told: Callable[[str], None]) -> Path | None:
    """What a killed run has left to go on with; refused if it was made from something else."""
    for folder in left_behind(out):
        found = read_journal(folder)
        if found is None:
            continue
        if other := [key for key, value in origin.items() if found[0].get(key) != value]:
            raise UsageError(
                "the run that was killed was another one, and cannot be gone on with",
                where=str(folder / JOURNAL),
                got=f"another {', another '.join(other)}",
                fix="the same input and options, or start anew without --resume",
            )
        return folder
    told("nothing to resume: starting from the beginning")
    return None


def _stamps(files: Sequence[Path]) -> dict[str, list[int]]:
    """What shows that a file was not changed, without reading it: bytes, and when written."""
    stats = {path.name: path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _check_unchanged(files: Sequence[Path], stamps: dict[str, list[int]]) -> None:
    if changed := [name for name, stamp in _stamps(files).items() if stamps[name] != stamp]:
        raise InputError("the source was changed while it was read", where=", ".join(changed))


def _run(
    work: Work,
    pieces: Pieces,
    journal: Journal,
    workers: int,
    progress: Progress,
) -> list[LayerRow]:
    """Write every tensor that ``journal`` does not have yet; return the rows of the report."""
    rows = {name: row and row_from_json(row) for name, row in journal.done.items()}
    for name in rows:
        for stored in work.jobs[name].writes:
            pieces.weights.written(stored)
    sizes = {name: pieces.source.entries[name].nbytes for name in work.jobs}
    pieces.earlier_bytes, total = sum(sizes[name] for name in rows), max(1, sum(sizes.values()))
    todo = {n: partial(job.run, pieces) for n, job in work.jobs.items() if n not in rows}
    committed = time.monotonic()
    with closing(finished(todo, workers, pieces.stop)) as results:
        for result in results:
            if result is not None:
                name, rows[name] = result
                journal.add(name, rows[name] and asdict(rows[name]))
            if time.monotonic() - committed >= COMMIT_SECONDS:
                pieces.sync()
                journal.commit()
                committed = time.monotonic()
            read = min(pieces.earlier_bytes + pieces.read_bytes, total)
            progress(read, total, result[0] if result else "")
    progress(total, total, "")
    pieces.weights.finish()
    return work.rows(rows)
