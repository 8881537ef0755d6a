"""What commands share: options, progress on a terminal, and JSON on request."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from qkit.errors import UsageError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*decorators: Decorator) -> Decorator:
    """Several click options as one decorator."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads for torch (default: torch's own)."
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of generated inputs."
)


report_option = click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Also write a report for people: FILE.html (one file, with charts), FILE.md or FILE.json "
    "(of the same numbers). Repeatable.",
)


def calib_option(what: str, *names: str) -> Decorator:
    """``--calib``, or one of ``names`` too: where data are."""
    return click.option(
        *names,
        "--calib",
        "calib",
        type=click.Path(),
        metavar="DATA",
        help=f"{what}: FILE.npz (arrays by argument name), a folder of pictures, or "
        "MODULE:FUNCTION, which returns batches.",
    )


def ignore_option(what: str) -> Decorator:
    """``--ignore``: layers to leave alone."""
    return click.option(
        "--ignore",
        multiple=True,
        metavar="NAME",
        help=f"{what}: its full name, a class name, or re:PATTERN. Repeatable.",
    )


image_option = click.option(
    "--image",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a folder of pictures is read: resize, crop, mean, std, color (rgb or gray), count "
    "[resize=256 crop=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225 count=512]. Repeatable.",
)
runtime_cache_option = click.option(
    "--runtime-cache",
    is_flag=True,
    help="Convolutions keep their weights in float between calls: faster, for the memory.",
)
architecture_options = options(
    click.option(
        "--model",
        metavar="MODULE:FACTORY",
        help="A function or class that builds the architecture, such as net:Net or net.py:Net.",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Unpickle a file that is not plain torch.nn. This RUNS CODE that is in the file.",
    ),
)


def typed() -> str:
    """The command as it was typed, to run it again."""
    return shlex.join(["qkit", *click.get_current_context().find_root().obj])


def set_threads(threads: int | None) -> None:
    """Set torch's number of threads, if one was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


_SIZE = re.compile(r"([0-9]+) *([KMGT]?)(I?)B?", re.I)


def size_bytes(text: str | None) -> int | None:
    """The bytes of a size such as ``500MB`` or ``2GiB``; None of None."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError("not a size", got=repr(text), wanted="such as 500MB or 2GB")
    base = 1024 if match[3] else 1000
    return int(match[1]) * int(base ** " KMGT".index(match[2].upper() or " "))


def teller(enabled: bool) -> Callable[[str], None]:
    """What prints a line on standard error, or, unless ``enabled``, nothing."""

    def told(text: str) -> None:
        if enabled:
            click.echo(text, err=True)

    return told


def print_result(report: Any, show: Callable[[Any], None], *, as_json: bool, quiet: bool) -> None:
    """Print a report: as JSON, as ``show`` does, or not at all."""
    if as_json:
        click.echo(report.dumps(), nl=False)
    elif not quiet:
        show(report)


def print_json(data: Any) -> None:
    """Print ``data`` as JSON."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


@contextmanager
def progress_bar(
    title: str, *, enabled: bool = True, count_bytes: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error while the block runs; nothing where that is not a terminal.

    ``count_bytes`` says that what is counted are bytes; then their speed is shown too.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if count_bytes else (MofNCompleteColumn(),)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, name="")

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield update
