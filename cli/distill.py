"""``qkit distill``."""

from __future__ import annotations

from typing import Any

import click
from qkit.cli.common import (
    architecture_options,
    debug_option,
    image_option,
    json_option,
    print_result,
    progress_bar,
    quiet_option,
    seed_option,
    set_threads,
    teller,
    threads_option,
)
from qkit.cli.training import training_options, training_request


@click.command(short_help="Train a smaller model to answer as a larger one does.")
@click.argument("path", type=click.Path())
@click.option("--student", type=click.Path(), help="The student, in a file of its own.")
@click.option(
    "--student-model",
    metavar="MODULE:FACTORY",
    help="What builds the architecture of --student, as --model does that of the teacher.",
)
@click.option(
    "--keep-layers",
    type=click.IntRange(min=1),
    help="The student is the teacher with that many of its layers, spread evenly.",
)
@click.option(
    "--width",
    type=float,
    help="The student is the teacher pruned to that share of its parameters.",
)
@training_options
@image_option
@click.option(
    "--teacher",
    type=click.FloatRange(0, 1),
    help="The weight of the teacher's softened answers; the labels have the rest [0.9].",
)
@click.option(
    "--temperature",
    type=float,
    default=4.0,
    show_default=True,
    help="What softens the answers of both.",
)
@click.option(
    "--match",
    multiple=True,
    metavar="STUDENT=TEACHER",
    help="Also make the outputs of two modules alike, or with STUDENT=TEACHER:attention where they "
    "are large; layers means all layers of a transformer. Repeatable.",
)
@click.option(
    "--teacher-precision",
    metavar="SCHEME",
    help="What the teacher computes in: bf16, w8a16, w4a16-g32, ... [its own].",
)
@click.option(
    "--cache", is_flag=True, help="Compute the teacher's answers once, and keep them on disk."
)
@click.option("-o", "--output", type=click.Path(), help="Folder to write [NAME-distilled].")
@architecture_options
@click.option("--resume", is_flag=True, help="Go on where a run for the same output was killed.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@threads_option
@seed_option
@json_option
@quiet_option
@debug_option
def command(
    path: str,
    threads: int | None,
    seed: int,
    resume: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Train a student with data and with what the model in PATH, its teacher, answers to them.

    The student is verified in a fresh process and is what quantize takes. PATH is what quantize
    takes, or an artifact of prune.
    """
    from qkit.cli.table import print_distillation

    from qkit.errors import UsageError
    from qkit.flows.distill_file import EPOCHS, DistillRequest, distill_file

    set_threads(threads)
    talk = not (quiet or as_json)
    training = training_request(
        options, resume=resume, seed=seed, defaults={"epochs": EPOCHS, "lr": 1e-3}
    )
    if training is None:
        raise UsageError("a student learns from data", fix="--train DATA")

    del options["image"]  # it says how training data are read
    with progress_bar("distilling", enabled=talk) as progress:
        report = distill_file(
            DistillRequest(path=path, training=training, **options),
            progress=progress,
            told=teller(talk),
        )
    print_result(report, print_distillation, as_json=as_json, quiet=quiet)
