"""``qkit bench compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from qkit.cli.common import debug_option, json_option

if TYPE_CHECKING:
    from qkit.report.regression import Changes


@click.command("compare", short_help="Tell what became slower between two runs.")
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="What changes from one run to the next by itself.",
)
@click.option(
    "--control",
    metavar="PATTERN",
    help="Benchmarks that did not change, such as '*torch*': ratios are relative to theirs.",
)
@click.option("--force", is_flag=True, help="Compare runs of two machines.")
@json_option
@debug_option
def command(
    before: str,
    after: str,
    noise: float,
    control: str | None,
    force: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Tell what became slower from the run BEFORE to the run AFTER.

    Both are folders of qkit bench (or their bench.json), or files of pytest --benchmark-json. Exit
    code 6 if a benchmark is slower beyond the noise, 3 if there is nothing to compare.
    """
    from pathlib import Path

    from qkit.errors import BudgetError
    from qkit.report.regression import compare_runs, read_run
    from qkit.targets.staging import BENCH

    paths = (Path(path) for path in (before, after))
    runs = [read_run(path / BENCH if path.is_dir() else path) for path in paths]
    changes = compare_runs(*runs, noise=noise, control=control, force=force)
    if as_json:
        click.echo(changes.dumps(), nl=False)
    else:
        print_changes(changes)
    if slower := changes.slower:
        worst = slower[0]
        raise BudgetError(
            f"{len(slower)} of {len(changes.rows)} benchmarks are slower by more than {noise:.0%}",
            got=f"{worst.name}: {worst.ratio:.2f} times as fast as before",
            wanted="none",
        )


def print_changes(changes: Changes) -> None:
    """A row for each benchmark, what only one run has, and the remarks."""
    from qkit.cli.table import console, grid

    table = grid()
    table.add_column("benchmark", overflow="fold")
    for name in ("before", "after", "times as fast", f"{changes.level:.0%} interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in changes.rows:
        table.add_row(
            row.name,
            f"{row.before:.4g} ms",
            f"{row.after:.4g} ms",
            f"{row.ratio:.3f}",
            f"{row.low:.3f} .. {row.high:.3f}",
            row.verdict,
        )
    out = console()
    out.print(table)
    for when, names in (("before", changes.gone), ("after", changes.new)):
        if names:
            out.print(f"only {when}: {', '.join(names)}")
    for remark in changes.remarks:
        out.print(f"note: {remark}")
    counts = f"{len(changes.slower)} of {len(changes.rows)} slower"
    out.print(f"{counts} by more than {changes.noise:.0%}")
