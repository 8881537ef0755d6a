"""``qkit.compiled``: a model with integer kernels in this process, for a server to call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from qkit.flows.data import Data
from qkit.flows.evaluate import AnyInputs
from qkit.flows.lower import lower
from qkit.flows.ptq import Progress, no_progress
from qkit.graph.capture import Dims
from qkit.report import Report
from qkit.spec import Recipe, Scheme
from qkit.targets.inductor import BACKEND
from qkit.targets.inductor.runtime import Package


def compiled(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    calib: Data | AnyInputs,
    ignore: Sequence[str] = (),
    observer: str = "minmax",
    dims: Dims | None = None,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> tuple[Package, Report]:
    """``model`` with the integer kernels of the target ``inductor``, and the report of its making.

    The package is called as the model is: ``net(x)``, or by name as ``calib`` names its inputs. It
    gives the model's tensors, in dicts and lists where it had objects. Arguments are those of
    :func:`qkit.flows.lower.lower`, which raises what is raised here: the result was verified in a
    fresh process and timed there beside the float model, compiled too. Nothing is left on disk.
    """
    with tempfile.TemporaryDirectory(prefix="qkit-compiled-") as folder:
        out = Path(folder, "artifact")
        report = lower(
            model,
            scheme,
            out,
            target=BACKEND.name,
            calib=calib,
            ignore=ignore,
            observer=observer,
            dims=dims,
            progress=progress,
            told=told,
        )
        report.artifact = None
        return Package(out / BACKEND.file), report
