"""``qkit factorize``."""

from __future__ import annotations

from typing import Any

import click
from qkit.cli.common import (
    architecture_options,
    debug_option,
    ignore_option,
    json_option,
    print_result,
    quiet_option,
    seed_option,
    set_threads,
    teller,
    threads_option,
)


@click.command(short_help="Make large layers two or more small ones.")
@click.argument("path", type=click.Path())
@click.option(
    "--amount",
    type=float,
    metavar="SHARE",
    help="Share of each layer's parameters to remove [0.5].",
)
@click.option("--energy", type=float, metavar="SHARE", help="Share of each layer's to keep.")
@click.option("--rank", type=int, help="The rank of every layer.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="With --amount: of all layers, where the output minds least.",
)
@click.option(
    "--conv",
    default="channel",
    show_default=True,
    help="Factors of convolutions: channel, spatial, tucker, cp, separable or none.",
)
@click.option("-o", "--output", type=click.Path(), help="Folder to write [NAME-factorized].")
@ignore_option("Leave a layer")
@click.option(
    "--input", "input_spec", metavar="SHAPE", help="Random inputs to compare on: 1x3x224x224."
)
@click.option(
    "--calib",
    type=click.Path(),
    metavar="FILE.npz",
    help="Real inputs: keep what matters to them, and compare on them.",
)
@architecture_options
@click.option("--dry-run", is_flag=True, help="Factorize and compare, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@threads_option
@seed_option
@json_option
@quiet_option
@debug_option
def command(
    path: str,
    amount: float | None,
    energy: float | None,
    rank: int | None,
    sensitivity: bool,
    conv: str,
    ignore: tuple[str, ...],
    input_spec: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Factorize the layers of the model in PATH and verify the result.

    Linear layers become two by a truncated SVD, convolutions two to four; only where that saves
    parameters. The artifact loads onto the model's own class.
    """
    from qkit.cli.table import print_report

    from qkit.flows.factorize import factorize_file
    from qkit.flows.factors import Wanted
    from qkit.flows.quantize import Request

    set_threads(threads)
    wanted = Wanted(amount, energy, rank, sensitivity, conv, ignore)

    request = Request(path=path, input=input_spec, ignore=ignore, **options)
    report = factorize_file(request, wanted, told=teller(not (quiet or as_json)))
    print_result(report, print_report, as_json=as_json, quiet=quiet)
