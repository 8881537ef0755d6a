"""``qkit targets``."""

from __future__ import annotations

import click
from qkit.cli.common import debug_option, json_option, print_json


@click.command(short_help="List where a quantized model can run.")
@json_option
@debug_option
def command(as_json: bool, debug: bool) -> None:
    """List the targets: where a quantized model can be deployed."""
    from qkit.spec import PRESETS, parse
    from qkit.targets import TARGETS

    rows = [
        {
            "name": target.name,
            "summary": target.summary,
            "extra": target.extra,
            "schemes": [name for name in PRESETS if target.expresses(parse(name))],
        }
        for target in TARGETS.values()
    ]
    if as_json:
        print_json({"targets": rows})
        return
    for row in rows:
        needs = f" (needs qkit-torch[{row['extra']}])" if row["extra"] else ""
        click.echo(f"{row['name']:8} {row['summary']}{needs}")
        click.echo(f"{'':8} schemes such as {', '.join(row['schemes'])}")
    click.echo("\nqkit schemes NAME tells what any other scheme means and which target runs it")
