"""``qkit verify``."""

from __future__ import annotations

import click
from qkit.cli.common import (
    architecture_options,
    debug_option,
    json_option,
    print_json,
    quiet_option,
    runtime_cache_option,
    set_threads,
    threads_option,
)


@click.command(short_help="Check an artifact in a fresh process.")
@click.argument("artifact", type=click.Path())
@click.option("--source", type=click.Path(), help="The model file that was quantized.")
@click.option(
    "--dialect",
    metavar="NAME",
    help="Of an .onnx file: tensorrt checks the rules of TensorRT's explicit quantization.",
)
@click.option(
    "--trust-code",
    is_flag=True,
    help="Run the native code of an AOTInductor package. This RUNS CODE.",
)
@architecture_options
@runtime_cache_option
@threads_option
@json_option
@quiet_option
@debug_option
def command(
    artifact: str,
    source: str | None,
    dialect: str | None,
    model: str | None,
    trust_pickle: bool,
    trust_code: bool,
    runtime_cache: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Check the hashes of ARTIFACT and run it again in a fresh process.

    ARTIFACT may also be an .onnx, .pte or .pt2 file, which is loaded and run on made-up inputs.
    """
    from qkit.flows import verify

    set_threads(threads)
    result = verify(
        artifact,
        model=model,
        source=source,
        trust_pickle=trust_pickle,
        trust_code=trust_code,
        dialect=dialect,
        runtime_cache=runtime_cache,
    )
    if as_json:
        print_json(result)
    elif not quiet and "rules" in result:
        click.echo("\n".join(f"met: {rule}" for rule in result["rules"]))
    elif not quiet and result["level"] == "file":
        kernels = ", ".join(f"{name} x{count}" for name, count in result["kernels"].items())
        click.echo(f"runs in {result['runtime']}, finite on inputs of ones; {kernels}")
    elif not quiet:
        ways = " and ".join(check["way"] for check in result["checks"])
        same = (
            "bit-identical" if result["bit_identical"] else f"within {result['max_rel_error']:.2g}"
        )
        click.echo(f"verified in a fresh process ({result['runtime']}; {ways}): {same}")
