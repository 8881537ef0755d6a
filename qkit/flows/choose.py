"""What can be streamed, and whether ``qkit quantize`` streams when it is not told.

It streams what loses nothing by it (bare tensors, whose model class nobody knows), and what would
take more than :data:`SHARE` of the free memory. A model that can be built is held in memory where
it fits, because then it is run beside its float original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkit.algorithms import CALIBRATED
from qkit.errors import QkitError, RequestError, UsageError
from qkit.flows.quantize import Request, destination, resolve_request
from qkit.flows.source import pruned_artifact
from qkit.models import sniff
from qkit.models.checkpoint import open_checkpoint
from qkit.models.folder import read_config
from qkit.models.sniff import FOLDER, PICKLE, SAFETENSORS, weight_files
from qkit.report import free_memory_bytes, package_version
from qkit.spec import Recipe, Scheme
from qkit.targets import check_format

# In memory, a checkpoint lies beside what it is quantized to and what is computed from it.
SHARE = 1 / 3


@dataclass(frozen=True)
class Choice:
    """Whether a run streams, and why."""

    streamed: bool
    reason: str

    def __str__(self) -> str:
        return f"{'streaming' if self.streamed else 'in memory'}: {self.reason}"


def choose(request: Request, *, streamed: bool | None = None) -> Choice:
    """Whether to stream ``request``; ``streamed`` is what the user says, if anything.

    Raises what refuses the request either way; what only streaming refuses is raised by
    :func:`qkit.flows.stream_file`, and here a reason to stay in memory.
    """
    if streamed is not None:
        return Choice(streamed, "as asked")
    scheme, recipe = resolve_request(request)
    check_format(request.format, scheme)
    destination(request, scheme)
    if pruned_artifact(request.path) is not None:
        return Choice(False, "a pruned artifact is loaded whole")
    kind, size = sniff(request.path), source_bytes(request.path)
    free = free_memory_bytes()
    large = size > SHARE * free
    beside = f"{_gb(size)} of weights, {_gb(free)} of free memory"
    if error := _obstacle(request, recipe, kind):
        warning = f" (expect it to run short: {beside})" if large else ""
        return Choice(False, f"{error.problem}{warning}")
    if large:
        return Choice(True, f"more than a third of the free memory ({beside})")
    if kind == FOLDER and _is_buildable(Path(request.path)):
        return Choice(False, f"the model fits ({beside}), and is run beside the float one")
    return Choice(True, "the file holds only tensors, so there is no model to run")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def source_bytes(path: str | Path) -> int:
    """The bytes of the files that hold the weights of a model."""
    path = Path(path)
    return sum(file.stat().st_size for file in (weight_files(path) if path.is_dir() else [path]))


def _is_buildable(folder: Path) -> bool:
    """Whether transformers is there to build the model of the folder."""
    config = read_config(folder) or {}
    return bool(config.get("architectures")) and package_version("transformers") is not None


def _obstacle(request: Request, recipe: Recipe, kind: str) -> QkitError | None:
    """Why a request stays in memory, whatever its size."""
    if error := obstacle(request, recipe):
        return error
    if request.trust_pickle:
        return UsageError("with --trust-pickle the code in the file is run once, whole")
    if kind not in (SAFETENSORS, PICKLE, FOLDER):
        return RequestError(f"a {kind} file is loaded whole")
    try:
        open_checkpoint(request.path)
    except RequestError as error:
        return RequestError(f"{error.got} is loaded whole")
    return None


def obstacle(request: Request, recipe: Recipe) -> QkitError | None:
    """Why a request cannot be streamed: it needs the model, or data; None where it can."""
    algorithms = {rule.algorithm for rule in recipe.rules if rule.scheme is not None}
    if learning := sorted(algorithms & CALIBRATED.keys()):
        return RequestError(
            f"{learning[0]} learns from the inputs of each layer, so the model itself must be run",
            got=f"--algorithm {learning[0]}",
            fix="--algorithm rtn needs no data; or leave out --stream",
        )
    given = {
        "--model": request.model,
        "--input": request.input,
        "--calib": request.calib,
        "--dry-run": request.dry_run,
        "--runtime-cache": request.runtime_cache,
    }
    if names := [name for name, value in given.items() if value]:
        return UsageError(
            f"{' and '.join(names)}: a checkpoint that is streamed is not run, and is written",
            fix="leave out --stream",
        )
    if request.format != "qkit":
        return UsageError(
            "--format qkit is what streaming writes", got=request.format, fix="leave out --stream"
        )
    for each in (rule.scheme for rule in recipe.rules if rule.scheme is not None):
        if lacks := _scheme_obstacle(each):
            return RequestError(
                f"{each.name} cannot be streamed: {lacks}",
                wanted="a data-free scheme",
                fix="leave out --stream, or take w8a8 (ranges found at each call)",
            )
    return None


def _scheme_obstacle(scheme: Scheme) -> str | None:
    if scheme.input is not None and scheme.input.when == "static":
        return "static ranges of activations are learnt from data"
    return None
