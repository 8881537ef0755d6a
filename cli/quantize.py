"""``qkit quantize``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from qkit.cli.common import (
    architecture_options,
    calib_option,
    debug_option,
    ignore_option,
    image_option,
    json_option,
    print_result,
    progress_bar,
    quiet_option,
    report_option,
    runtime_cache_option,
    seed_option,
    set_threads,
    size_bytes,
    teller,
    threads_option,
    typed,
)
from qkit.cli.training import training_options, training_request

if TYPE_CHECKING:
    from qkit.report import Report


@click.command()
@click.argument("path", type=click.Path())
@click.option("--scheme", default="w8a16", show_default=True, help="See: qkit schemes.")
@click.option(
    "--algorithm",
    default="auto",
    show_default=True,
    help="rtn; gptq or adaround (need --calib); auto: gptq below 8 bits where there is --calib. "
    "For int8 activations with a --target other than torch also equalization, smoothquant, "
    "bias-correction and least-squares, joined by +.",
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
    help="qkit; coded: one file, entropy coded; compressed-tensors: a folder that transformers "
    "loads; gguf: one file.",
)
@click.option(
    "--observer",
    default="minmax",
    show_default=True,
    help="With a --target other than torch: how ranges of activations are estimated: minmax, "
    "moving-average, percentile, mse, entropy.",
)
@click.option(
    "--dialect",
    metavar="NAME",
    help="With --target onnx: tensorrt writes what TensorRT's explicit quantization wants.",
)
@click.option(
    "--accuracy-level",
    type=click.IntRange(0, 4),
    default=0,
    show_default=True,
    help="With --target onnx and weights alone: that of MatMulNBits; 4 rounds activations to int8.",
)
@click.option(
    "--dynamic",
    multiple=True,
    metavar="INPUT.DIM=NAME",
    help="With a --target other than torch: a dimension that varies besides the batch. Repeatable.",
)
@click.option(
    "--bound",
    multiple=True,
    metavar="NAME=SIZE",
    help="With --target xnnpack: the largest size of a dimension that varies [batch=64, others "
    "512]. Repeatable.",
)
@click.option("-o", "--output", type=click.Path(), help="Folder (or file) to write [NAME-SCHEME].")
@click.option("--group-size", type=int, help="Weights that share a scale; -1 for whole rows.")
@ignore_option("Leave a layer in float")
@click.option(
    "--input",
    "input_spec",
    metavar="SHAPE",
    help="Random inputs to compare on, such as 1x3x224x224 or 2x16:int64.",
)
@calib_option("Real inputs to learn from and to compare on")
@image_option
@click.option(
    "--calib-report",
    is_flag=True,
    help="With a --target other than torch: show the range of each activation, what it clips, "
    "and outliers.",
)
@training_options
@click.option(
    "--teacher",
    type=click.FloatRange(0, 1),
    help="With --train: the weight of the loss against the float model's outputs [0].",
)
@click.option(
    "--temperature",
    type=float,
    default=2.0,
    show_default=True,
    help="What softens the outputs for --teacher.",
)
@click.option(
    "--freeze-ranges",
    type=click.IntRange(min=0),
    help="With --train: epochs after which the ranges stay [two thirds].",
)
@click.option(
    "--lsq",
    is_flag=True,
    help="With --train: train the steps of weights and activations too (learned step size "
    "quantization).",
)
@click.option(
    "--freeze-norms",
    type=click.IntRange(min=0),
    help="With --train: epochs after which the statistics of batch-norms stay [two thirds].",
)
@architecture_options
@runtime_cache_option
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Quantize piece by piece from disk, whatever the size, or hold the model in memory "
    "[stream bare tensors, and what takes more than a third of the free memory].",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Stream, to files of at most this size, such as 2GB or 500MB [one file].",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Stream, on this many threads, a tensor on each [1].",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Stream, or with --train train, going on where a run for the same output was killed.",
)
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Least share of parameters quantized, else exit 5.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Least output SQNR, else exit 6.")
@click.option(
    "--goal-sqnr",
    type=float,
    metavar="DB",
    help="With int8 for a runtime: leave the layers that cost most in float, at most a quarter, "
    "until the output has this SQNR, else exit 6.",
)
@click.option("--dry-run", is_flag=True, help="Quantize and compare, write no artifact.")
@report_option
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
    stream: bool | None,
    shard_size: str | None,
    workers: int | None,
    resume: bool,
    backend: str,
    reports: tuple[str, ...],
    **options: Any,
) -> None:
    """Quantize the model in PATH and verify the result.

    PATH is a pickled module or state dict, a TorchScript or torch.export file, a safetensors
    file, or a Hugging Face folder. Files are recognised without being executed.
    """
    from qkit.cli.table import print_report

    from qkit.errors import UsageError
    from qkit.flows import Request, choose, lower_file, quantize_file, quanto_file, stream_file
    from qkit.flows.documents import check_reports, write_report
    from qkit.targets import LOWERED

    set_threads(threads)
    talk = not (quiet or as_json)
    training = training_request(
        options, resume=resume, seed=options["seed"], defaults={"epochs": 6, "lr": 2e-4}
    )
    streams = resume and training is None
    asked = {"shard_bytes": size_bytes(shard_size), "workers": workers, "resume": streams}
    streaming = {name: value for name, value in asked.items() if value}
    if streaming and stream is False:
        raise UsageError(
            "--shard-size, --workers and --resume are for a run that streams", got="--no-stream"
        )
    if options["runtime_cache"] and backend != "qkit":
        raise UsageError("--runtime-cache is for qkit's own layers", got=f"--backend {backend}")
    if (stream or streaming) and backend != "qkit":
        raise UsageError("--stream is for qkit's own quantization", got=f"--backend {backend}")
    check_reports(*reports, overwrite=options["overwrite"])
    request = Request(
        path=path, input=input_spec, training=training, details=bool(reports), **options
    )

    told = teller(talk)
    lowered = request.target in LOWERED
    if lowered and (stream or streaming or backend != "qkit"):
        raise UsageError("--stream and --backend are for --target torch")
    others = {"--dialect": request.dialect, "--dynamic": request.dynamic}
    others |= {"--accuracy-level": request.accuracy_level, "--bound": request.bound}
    others |= {"--calib-report": request.calib_report, "--goal-sqnr": request.goal_sqnr}
    others |= {"--train": training}
    if not lowered and any(others.values()):
        wrong = ", ".join(name for name, value in others.items() if value)
        raise UsageError("an option of another target", got=wrong, fix="see: qkit targets")
    flow: Callable[..., Report] = lower_file if lowered else quanto_file
    if backend == "qkit" and not lowered:
        choice = choose(request, streamed=True if streaming else stream)
        told(str(choice))
        flow = stream_file if choice.streamed else quantize_file
    with progress_bar("quantizing", enabled=talk, count_bytes=flow is stream_file) as progress:
        report = flow(request, progress=progress, told=told, **streaming)
    write_report(report, *reports, command=typed(), overwrite=request.overwrite)
    print_result(report, print_report, as_json=as_json, quiet=quiet)
