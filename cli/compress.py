"""``qkit compress``."""

from __future__ import annotations

import click
from qkit.cli.common import (
    architecture_options,
    debug_option,
    json_option,
    print_json,
    quiet_option,
    report_option,
    set_threads,
    teller,
    threads_option,
    typed,
)


@click.command(short_help="Follow a recipe of steps, with a ledger.")
@click.argument("recipe", type=click.Path())
@click.argument("path", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="What to write [NAME-compressed].")
@click.option(
    "--work",
    type=click.Path(),
    metavar="FOLDER",
    help="Keep the model after each step there, and go on behind what is there.",
)
@architecture_options
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, write no model.")
@report_option
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@threads_option
@json_option
@quiet_option
@debug_option
def command(
    recipe: str,
    path: str,
    output: str | None,
    work: str | None,
    model: str | None,
    trust_pickle: bool,
    dry_run: bool,
    reports: tuple[str, ...],
    overwrite: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Follow RECIPE (YAML or JSON) on the model in PATH, and verify each step.

    \b
    steps:
      - factorize: {amount: 0.5}
      - prune: {amount: 0.5}        # sparsify: {amount: 0.9} for single weights
      - train: {epochs: 5}
      - distill: {epochs: 5}        # the model as it was is the teacher
      - cluster: {entries: 16}      # or quantize: {scheme: w8a16}; qat or export for a runtime
    data: train.npz                 # inputs and labels, or module:function
    val: test.npz
    format: coded                   # or qkit, a folder
    """
    from qkit.cli.table import print_ledger

    from qkit.flows.compress import CompressRequest, compress_file, read_recipe
    from qkit.flows.compress.run import plan_lines
    from qkit.flows.documents import check_reports, write_report

    set_threads(threads)
    talk = not (quiet or as_json)
    check_reports(*reports, overwrite=overwrite)

    request = CompressRequest(recipe, path, output, work, model, trust_pickle, overwrite, dry_run)
    if talk and dry_run:
        click.echo("\n".join(plan_lines(read_recipe(recipe))))
    ledger = compress_file(request, told=teller(talk))
    write_report(ledger, *reports, command=typed(), overwrite=overwrite)
    if as_json:
        print_json(ledger.to_json())
    elif not quiet:
        print_ledger(ledger)
