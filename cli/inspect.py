"""``qkit inspect``."""

from __future__ import annotations

import click
from qkit.cli.common import debug_option, json_option, print_json


@click.command(short_help="Show a model's modules, parameters and bytes.")
@click.argument("path", type=click.Path())
@click.option(
    "--depth", type=click.IntRange(min=1), default=6, show_default=True, help="Levels shown."
)
@click.option(
    "--rd",
    is_flag=True,
    help="Rate-distortion view: bits, error, and distance to the bound, by weight and scheme.",
)
@click.option(
    "--scheme", "schemes", multiple=True, help="With --rd: a scheme to look at. Repeatable."
)
@click.option("--trust-pickle", is_flag=True, help="Unpickle a custom module. This RUNS CODE.")
@json_option
@debug_option
def command(
    path: str,
    depth: int,
    rd: bool,
    schemes: tuple[str, ...],
    trust_pickle: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Show the modules of a model or artifact with parameters, types and bytes."""
    from qkit.cli.table import print_rates, print_tree

    from qkit.flows import inspect, rate_distortion

    if schemes and not rd:
        raise click.UsageError("--scheme belongs to --rd")
    if rd:
        points = rate_distortion(path, schemes, trust_pickle=trust_pickle)
        if as_json:
            print_json({"points": [point.to_json() for point in points]})
        else:
            print_rates(points)
        return
    root = inspect(path, trust_pickle=trust_pickle)
    if as_json:
        print_json(root.to_json())
    else:
        print_tree(root, depth)
