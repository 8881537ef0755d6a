"""``qkit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from qkit.cli.common import (
    architecture_options,
    calib_option,
    debug_option,
    image_option,
    json_option,
    print_result,
    quiet_option,
    report_option,
    runtime_cache_option,
    seed_option,
    teller,
    typed,
)

if TYPE_CHECKING:
    from qkit.report import BenchReport


def numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """``1,8`` as a tuple."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not like 1 or 1,8") from error


@click.command(short_help="Measure models and artifacts side by side.")
@click.argument("contenders", nargs=-1, required=True, metavar="[NAME=]PATH...")
@calib_option("Real inputs", "--inputs")
@click.option("--input", "input_spec", metavar="SHAPE", help="Random inputs, such as 1x3x224x224.")
@image_option
@click.option(
    "--batch",
    callback=numbers,
    default="1",
    show_default=True,
    metavar="N,...",
    help="Samples in a call; several with commas.",
)
@click.option(
    "--threads",
    callback=numbers,
    metavar="N,...",
    help="Threads of each contender; several with commas [torch's own number].",
)
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="A function of a model (a function of tensors) that returns a figure, such as its "
    "accuracy on your data, which it runs in batches of the largest size.",
)
@click.option(
    "--baseline",
    metavar="NAME",
    help="The contender that speeds and errors refer to [the first one].",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="How long each contender is timed, for each batch and number of threads.",
)
@click.option("--repeats", type=click.IntRange(min=5), help="Instead, the number of turns.")
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Fresh processes of each contender, one after the other.",
)
@architecture_options
@click.option(
    "--trust-code",
    is_flag=True,
    help="Run the native code of an AOTInductor package. This RUNS CODE.",
)
@runtime_cache_option
@click.option("-o", "--output", type=click.Path(), help="Folder to write: bench.json and bench.md.")
@report_option
@click.option("--overwrite", is_flag=True, help="Replace a benchmark at the output.")
@seed_option
@json_option
@quiet_option
@debug_option
def command(
    contenders: tuple[str, ...],
    calib: str | None,
    input_spec: str | None,
    image: tuple[str, ...],
    batch: tuple[int, ...],
    output: str | None,
    reports: tuple[str, ...],
    overwrite: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure each PATH in fresh processes of its own, in turns, on the same inputs.

    PATH is a float model (what quantize takes), an artifact, a file of another runtime (.onnx,
    .pte, .pt2), or a folder of optimum-quanto or compressed-tensors. The first one is the baseline
    of speeds and errors. A contender that fails is a row of the report, and the exit code is 1.
    """
    from qkit.errors import QkitError, UsageError
    from qkit.flows.bench import bench, check_bench_destination, save_bench
    from qkit.flows.data import open_data
    from qkit.flows.documents import check_reports, write_report
    from qkit.models import parse_input_spec

    if input_spec and calib:
        raise UsageError("give --input or --calib, not both")
    if output:
        check_bench_destination(output, overwrite=overwrite)
    check_reports(*reports, overwrite=overwrite)
    inputs: Any = parse_input_spec(input_spec, seed=seed) if input_spec else None
    if calib:
        inputs = open_data(calib, images=image)
    report = bench(
        _named(contenders),
        inputs,
        batches=batch,
        told=teller(not (quiet or as_json)),
        command=typed(),
        **options,
    )
    if output:
        save_bench(report, output, overwrite=overwrite)
    write_report(report, *reports, overwrite=overwrite)
    print_result(report, _print, as_json=as_json, quiet=quiet)
    if report.failed:
        raise QkitError(
            f"{len(report.failed)} of {len(report.contenders)} contenders failed",
            got=", ".join(each.name for each in report.failed),
        )


def _named(texts: tuple[str, ...]) -> Any:
    """The paths, by name where names are given."""
    from qkit.errors import UsageError

    pairs = [("", t) if Path(t).exists() else t.rpartition("=")[::2] for t in texts]
    if not any(name for name, _ in pairs):
        return [path for _, path in pairs]
    found = {name or path: path for name, path in pairs}
    if len(found) < len(pairs):
        raise UsageError("two contenders of one name", got=", ".join(n for n, _ in pairs))
    return found


def _print(report: BenchReport) -> None:
    """Tables, then sentences."""
    from qkit.cli.table import console, grid

    from qkit.report.bench_text import grids, sentences

    out = console()
    for part in grids(report):
        if not part.rows:
            continue
        table = grid()
        for index, name in enumerate(part.head):
            table.add_column(name, justify="right" if index > 1 else "left", overflow="fold")
        for row in part.rows:
            table.add_row(*row)
        out.print(table)
        out.print()
    for line in sentences(report):
        out.print(line)
