"""Processes: accelerate's set-up, which part of a batch each has, and random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qkit.errors import UsageError
from qkit.flows.train.options import TrainOptions
from qkit.flows.train.samples import Batch, mixed
from qkit.targets import require_packages


def start(options: TrainOptions, folder: Path | None) -> Any:
    """accelerate's ``Accelerator`` for a run: the device, the precision, the processes that
    ``torchrun`` started, and trackers.

    Raises :class:`~qkit.errors.MissingExtraError` without accelerate or a tracker's package, and
    :class:`~qkit.errors.UsageError` for a precision that the device does not have.
    """
    require_packages(["accelerate"], "train", "training")
    for tracker in options.trackers:
        require_packages([tracker], "train", f"the tracker {tracker!r}")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # It keeps the precision of the first run of a process for all later ones, unless told not to.
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(options.precision, options.precision)
    try:
        accelerator = Accelerator(
            cpu=options.device == "cpu",
            mixed_precision=precision,
            log_with=list(options.trackers) or None,
            project_dir=None if folder is None else str(folder),
            # Heads and branches that a loss does not reach are common.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise UsageError(
            f"training cannot be set up: {str(error).splitlines()[0]}",
            got=f"precision {options.precision}",
            fix="bf16, which processors have too, or fp32",
        ) from error
    if options.trackers:
        config = {k: v for k, v in options.to_json().items() if isinstance(v, int | float | str)}
        accelerator.init_trackers("qkit", config)
    return accelerator


def groups(stream: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """``count`` batches at a time; the last group may be short."""
    while group := list(islice(stream, count)):
        yield group


def local_part(batch: Batch, rank: int, processes: int) -> Batch:
    """What process ``rank`` has of a batch; each has the whole one if it is too small to share."""
    if not is_shared(batch, processes):
        return batch
    count = len(batch)
    return batch.part(slice(count * rank // processes, count * (rank + 1) // processes))


def is_shared(batch: Batch, processes: int) -> bool:
    """Whether there is a sample of ``batch`` for each of several processes."""
    return 1 < processes <= len(batch)


def seed_all(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators with a function of ``numbers``.

    Done before each step with the place in the run, it makes random numbers a function of that:
    a resumed run draws the same ones, and no state is stored.
    """
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """The generators of the process are behind the block as they were before it."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
