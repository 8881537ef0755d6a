"""``qkit quantize``."""

from __future__ import annotations

from typing import Any

import click
from qkit.cli.common import (
    architecture_options,
    debug_option,
    json_option,
    progress_bar,
    quiet_option,
    seed_option,
    set_threads,
    size_bytes,
    threads_option,
)


@click.command()
@click.argument("path", type=click.Path())
@click.option("--scheme", default="w8a16", show_default=True, help="See: qkit schemes.")
@click.option(
    "--algorithm",
    default="auto",
    show_default=True,
    help="rtn; gptq (needs --calib); auto: gptq below 8 bits where there is --calib.",
)
@click.option(
    "--backend",
    type=click.Choice(["qkit", "quanto"]),
    default="qkit",
    show_default=True,
    help="quanto: let optimum-quanto quantize, with --scheme qint8, qint4, qint2 or qfloat8.",
)
@click.option("--target", default="torch", show_default=True, help="See: qkit targets.")
@click.option(
    "--format",
    default="qkit",
    show_default=True,
    help="qkit; compressed-tensors: a folder that transformers loads; gguf: one file.",
)
@click.option("-o", "--output", type=click.Path(), help="Folder (or file) to write [NAME-SCHEME].")
@click.option("--group-size", type=int, help="Weights that share a scale; -1 for whole rows.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="NAME",
    help="Leave a layer in float: its full name, a class name, or re:PATTERN. Repeatable.",
)
@click.option(
    "--input",
    "input_spec",
    metavar="SHAPE",
    help="Random inputs to compare on, such as 1x3x224x224 or 2x16:int64.",
)
@click.option(
    "--calib",
    type=click.Path(),
    metavar="FILE.npz",
    help="Real inputs, by argument name: to learn from and to compare on.",
)
@architecture_options
@click.option(
    "--stream",
    is_flag=True,
    help="Quantize tensor by tensor from disk: for checkpoints larger than memory.",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="With --stream: greatest size of a file of weights, such as 2GB or 500MB [one file].",
)
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Least share of parameters quantized, else exit 5.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Least output SQNR, else exit 6.")
@click.option("--dry-run", is_flag=True, help="Quantize and compare, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@threads_option
@seed_option
@json_option
@quiet_option
@debug_option
def command(
    path: str,
    input_spec: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    stream: bool,
    shard_size: str | None,
    backend: str,
    **options: Any,
) -> None:
    """Quantize the model in PATH and verify the result.

    PATH is a pickled module or state dict, a TorchScript or torch.export file, a safetensors
    file, or a Hugging Face folder. Files are recognised without being executed.
    """
    from qkit.cli.table import print_report

    from qkit.errors import UsageError
    from qkit.flows import Request, quantize_file, quanto_file, stream_file

    set_threads(threads)
    talk = not (quiet or as_json)
    if shard_size and not stream:
        raise UsageError("--shard-size is for --stream")
    if stream and backend != "qkit":
        raise UsageError("--stream is for qkit's own quantization", got=f"--backend {backend}")
    flow = quanto_file if backend == "quanto" else stream_file if stream else quantize_file
    shards = {"shard_bytes": size_bytes(shard_size)} if stream else {}
    with progress_bar("quantizing", enabled=talk) as progress:
        report = flow(
            Request(path=path, input=input_spec, **options),
            progress=progress,
            told=lambda text: click.echo(text, err=True) if talk else None,
            **shards,
        )
    if as_json:
        click.echo(report.dumps(), nl=False)
    elif not quiet:
        print_report(report)
