"""``qkit compare``."""

from __future__ import annotations

from typing import Any

import click
from qkit.cli.common import (
    architecture_options,
    calib_option,
    debug_option,
    image_option,
    json_option,
    print_json,
    seed_option,
    set_threads,
    threads_option,
)


@click.command(short_help="Show how two models differ, layer by layer.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--input", "input_spec", metavar="SHAPE", help="Random inputs, such as 1x3x32x32.")
@calib_option("Real inputs")
@image_option
@click.option(
    "--per-layer",
    is_flag=True,
    help="Quantize each layer of B alone too, and tell which layers to leave in float. B may be an "
    "artifact of a --target other than torch, with --calib of its run.",
)
@click.option(
    "--gain",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="DB",
    help="With --per-layer: what leaving layers in float should gain.",
)
@architecture_options
@threads_option
@seed_option
@json_option
@debug_option
def command(
    a: str,
    b: str,
    input_spec: str | None,
    calib: str | None,
    image: tuple[str, ...],
    per_layer: bool,
    gain: float,
    model: str | None,
    trust_pickle: bool,
    threads: int | None,
    seed: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Show how model or artifact B differs from A, at the output and in each layer."""
    from qkit.cli.table import print_comparison

    from qkit.errors import UsageError
    from qkit.flows import compare
    from qkit.flows.data import open_data
    from qkit.models import parse_input_spec

    if input_spec and calib:
        raise UsageError("give --input or --calib, not both")
    set_threads(threads)
    inputs: Any = parse_input_spec(input_spec, seed=seed) if input_spec else None
    if calib:
        inputs = open_data(calib, images=image)
    result = compare(
        a, b, inputs, model=model, trust_pickle=trust_pickle, per_layer=per_layer, gain=gain
    )
    if as_json:
        print_json(result.to_json())
    else:
        print_comparison(result)
