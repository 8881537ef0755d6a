"""Reports as files for people: HTML, Markdown and JSON of the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qkit.errors import QkitError, UsageError
from qkit.flows.compress.document import ledger_document
from qkit.flows.compress.ledger import Ledger
from qkit.flows.inspect import Node, inspect
from qkit.report import BenchReport, Document, Report
from qkit.report.bench_document import bench_document
from qkit.report.html import check_html, to_html
from qkit.report.markdown import to_markdown
from qkit.report.quantization import quantization_document
from qkit.targets.staging import as_output_error, check_file_destination, parents, write_whole

Outcome = Report | Ledger | BenchReport

# By suffix: how a document is written, and what such a file begins with.
WRITERS: dict[str, tuple[Callable[[Document], str], bytes]] = {
    ".html": (to_html, b"<!doctype html>"),
    ".md": (to_markdown, b"# "),
    ".json": (Document.dumps, b'{\n  "format"'),
}


def write_report(
    outcome: Outcome,
    *paths: str | Path,
    command: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write what a run measured as documents; the suffix says which: .html (one file, with charts,
    that needs nothing else), .md or .json.

    ``command`` is what makes it again. Where the artifact is still at its place, the document tells
    its bytes too. Raises what :func:`check_reports` raises, and
    :class:`~qkit.errors.OutputError` if a file cannot be written.
    """
    check_reports(*paths, overwrite=overwrite)
    document = document_of(outcome, command)
    for path in map(Path, paths):
        writer, _ = WRITERS[path.suffix]
        text = writer(document)
        with as_output_error(path), parents(path.absolute()):
            write_whole(path, text.encode())


def check_reports(*paths: str | Path, overwrite: bool = False) -> None:
    """Refuse what could not be written, before any work is paid for.

    Raises :class:`~qkit.errors.UsageError` for another suffix and a file that exists (``overwrite``
    replaces one of the same kind), :class:`~qkit.errors.OutputError` where nothing can be written,
    and :class:`~qkit.errors.MissingExtraError` without the packages for HTML.
    """
    for path in map(Path, paths):
        if path.suffix not in WRITERS:
            raise UsageError(
                "a report is written as HTML, Markdown or JSON",
                got=str(path),
                wanted=f"a name that ends in {', '.join(WRITERS)}",
            )
        if path.suffix == ".html":
            check_html()
        check_file_destination(path, WRITERS[path.suffix][1], overwrite=overwrite)


def document_of(outcome: Outcome, command: str | None = None) -> Document:
    """What a run measured as a document, which ``command`` makes again (a bench knows its own)."""
    if isinstance(outcome, BenchReport):
        return bench_document(outcome)
    files, layers = _bytes(outcome.artifact)
    if isinstance(outcome, Ledger):
        return ledger_document(outcome, command, files=files, layers=layers)
    return quantization_document(outcome, command, files=files, layers=layers)


def _bytes(artifact: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of the files of an artifact, and of the layers in its weights; empty where it is
    not known."""
    if artifact is None or not Path(artifact).exists():
        return {}, {}
    path = Path(artifact)
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = {
        file.relative_to(path if path.is_dir() else path.parent).as_posix(): file.stat().st_size
        for file in found
        if file.is_file()
    }
    try:
        layers = dict(_own(inspect(path), ""))
    except QkitError:  # the file of another runtime has no tensors that qkit reads
        layers = {}
    return files, layers


def _own(node: Node, path: str) -> Iterator[tuple[str, int]]:
    """What each module holds itself."""
    modules: list[Any] = [child for child in node.children if child.name]
    own = node.bytes - sum(child.bytes for child in modules)
    if own:
        yield path or "(the model)", own
    for child in modules:
        yield from _own(child, f"{path}.{child.name}" if path else child.name)
