"""``qkit demo``."""

from __future__ import annotations

import click
from qkit.cli.common import debug_option, json_option, progress_bar, quiet_option, seed_option


@click.command(short_help="Train a small CNN, quantize and verify it.")
@click.option("--scheme", default="w8a16", show_default=True, help="See: qkit schemes.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    default="qkit-demo",
    show_default=True,
    help="Folder for the model, the data and the artifact.",
)
@seed_option
@json_option
@quiet_option
@debug_option
def command(scheme: str, output: str, seed: int, as_json: bool, quiet: bool, debug: bool) -> None:
    """Train a small CNN on real handwritten digits, quantize it, verify it, show the report."""
    from pathlib import Path

    from qkit.cli.table import print_report

    from qkit.flows import Request, quantize_file
    from qkit.flows.demo import accuracy, prepare
    from qkit.spec import parse

    talk = not (quiet or as_json)

    def say(text: str) -> None:
        if talk:
            click.echo(text, err=True)

    name = parse(scheme).name
    say("training a CNN on scikit-learn's digits")
    model, calib, data = prepare(Path(output), seed=seed)
    out = Path(output) / f"digits-{name}"
    say(f"$ qkit quantize {model} --scheme {scheme} --calib {calib} -o {out} --overwrite")
    with progress_bar("quantizing", enabled=talk) as progress:
        report = quantize_file(
            Request(str(model), scheme=scheme, calib=str(calib), output=str(out), overwrite=True),
            progress=progress,
            told=say,
            metrics=lambda float_model, quantized: {
                "accuracy %": {
                    "float": accuracy(float_model, data),
                    name: accuracy(quantized, data),
                }
            },
        )
    if as_json:
        click.echo(report.dumps(), nl=False)
    elif not quiet:
        print_report(report)
