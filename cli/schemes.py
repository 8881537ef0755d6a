"""``qkit schemes``."""

from __future__ import annotations

import click
from qkit.cli.common import debug_option, json_option, print_json


@click.command()
@click.argument("names", nargs=-1)
@json_option
@debug_option
def command(names: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """List the schemes, or spell out what NAMES mean."""
    from qkit.spec import PRESETS, parse
    from qkit.spec.scheme import ALIASES
    from qkit.targets import targets_of

    schemes = [(name, parse(name)) for name in names or PRESETS]
    if as_json:
        rows = [
            {
                "name": scheme.name,
                "given": name,
                "long": scheme.long_form(),
                "summary": PRESETS.get(scheme.name),
                "targets": targets_of(scheme),
                "scheme": scheme.to_json(),
            }
            for name, scheme in schemes
        ]
        print_json({"schemes": rows, "aliases": ALIASES})
        return
    for name, scheme in schemes:
        runs = ", ".join(targets_of(scheme))
        click.echo(f"{name:18} {PRESETS.get(scheme.name, 'as follows')}  [target {runs}]")
        click.echo(f"{'':18} {scheme.long_form()}")
    if not names:
        click.echo("\nGrammar: w<1-8>a<16|32|8|4>[-g<size>|-channel|-tensor][-sym|-asym]")
        click.echo(
            "         nf4, fp8-e4m3, fp8-e5m2 [-g<size>|-channel|-tensor]; mxfp4, mxfp8; fp16, bf16"
        )
        click.echo("Aliases: " + ", ".join(f"{k} = {v}" for k, v in ALIASES.items() if k != v))
