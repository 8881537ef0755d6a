"""``qkit doctor``."""

from __future__ import annotations

import click
from qkit.cli.common import debug_option, json_option, print_json


@click.command(short_help="Show what works on this machine.")
@json_option
@debug_option
def command(as_json: bool, debug: bool) -> None:
    """Show versions, instruction sets, threads, compiler, and which extras work."""
    from qkit.flows.doctor import doctor

    facts = doctor()
    if as_json:
        print_json(facts)
        return
    for name, version in facts["versions"].items():
        click.echo(f"{name:16} {version}")
    about = facts["machine"]
    click.echo(f"{'processor':16} {about['cpu']} ({about['arch']}), {about['cores']} cores")
    click.echo(f"{'instructions':16} {' '.join(about['isa']) or 'none that qkit knows'}")
    click.echo(f"{'threads':16} {about['threads']}")
    compiler = facts["compiler"] or "none (--target inductor needs one)"
    click.echo(f"{'C++ compiler':16} {compiler}")
    kernels = facts["kernels"]
    click.echo(f"{'native kernels':16} {kernels['status']}")
    used = "used" if kernels["native"] else "would be used"
    click.echo(f"{'':16} {used} for {kernels['used_for']}; the rest is plain torch")
    for extra, row in facts["extras"].items():
        states = ", ".join(f"{name}: {state}" for name, state in row["packages"].items())
        click.echo(f"{'extra ' + extra:16} {'works' if row['works'] else 'no'} ({states})")
