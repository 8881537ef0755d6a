"""``qkit prune``."""

from __future__ import annotations

from typing import Any

import click
from qkit.cli.common import (
    architecture_options,
    calib_option,
    debug_option,
    ignore_option,
    image_option,
    json_option,
    print_result,
    quiet_option,
    seed_option,
    set_threads,
    teller,
    threads_option,
)


@click.command(short_help="Remove channels, neurons and heads; a smaller model comes out.")
@click.argument("path", type=click.Path())
@click.option(
    "--amount",
    type=float,
    default=0.5,
    show_default=True,
    help="The share to remove, above 0 and below 1.",
)
@click.option(
    "--unit",
    default="macs",
    show_default=True,
    help="What the share is of: macs (multiply-adds), params, bytes, latency (measured here).",
)
@click.option(
    "--importance",
    default="l1",
    show_default=True,
    help="What goes first: l1, l2, bn, activation, random; taylor (needs --loss).",
)
@click.option("-o", "--output", type=click.Path(), help="Folder to write [NAME-pruned].")
@ignore_option("Keep the outputs of a layer")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Least number of channels (heads, neurons) that stay in each group.",
)
@click.option(
    "--round-to",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Keep multiples of this many rows, which run fast (fewer in small layers).",
)
@click.option("--per-layer", is_flag=True, help="The same share of every layer.")
@click.option(
    "--through-norms",
    is_flag=True,
    help="Also what layer norms and means go over, such as the width of a transformer.",
)
@click.option(
    "--blocks",
    is_flag=True,
    help="Whole blocks instead (layers of a transformer, residual blocks), those first without "
    "which the outputs change least.",
)
@click.option(
    "--loss",
    metavar="MODULE:FUNCTION",
    help="For taylor: a function of the model that returns its loss on some data.",
)
@click.option("--input", metavar="SHAPE", help="Random inputs, such as 1x3x224x224 or 2x16:int64.")
@calib_option("Real inputs, to trace, compare and time with", "--inputs")
@image_option
@architecture_options
@click.option("--dry-run", is_flag=True, help="Prune and compare, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@threads_option
@seed_option
@json_option
@quiet_option
@debug_option
def command(
    path: str, threads: int | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Remove channels, neurons and attention heads from the model in PATH; verify the result.

    What belongs to them in other layers goes too, so that the model is smaller and faster in any
    runtime. PATH is what quantize takes, or an artifact.
    """
    from qkit.cli.table import print_pruning

    from qkit.flows.prune import PruneRequest, prune_file

    set_threads(threads)
    report = prune_file(PruneRequest(path=path, **options), told=teller(not (quiet or as_json)))
    print_result(report, print_pruning, as_json=as_json, quiet=quiet)
