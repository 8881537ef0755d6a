"""``qkit quantize --stream``: checkpoints larger than memory, some rows of one tensor at a time.

Memory holds a block of rows and what it is quantized to, whatever the size of the model. The
layers are those of :func:`qkit.nn.tree`, guessed from names and dimensions; each row has its own
scales, so its codes are those of the whole weight, and the weights file is, byte for byte, the one
that ``qkit quantize`` writes for the same tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import RequestError, UsageError
from qkit.flows.check import weight_output
from qkit.flows.evaluate import fill_weight_error, new_report
from qkit.flows.ptq import (
    Plan,
    Progress,
    check_damage,
    join,
    left_row,
    no_progress,
    plan_layers,
    quantized_row,
    short_group,
    tied_row,
)
from qkit.flows.quantize import Request, default_output, resolve_request
from qkit.flows.save import check_budgets, complete, head
from qkit.flows.verify import verify
from qkit.models.checkpoint import Checkpoint, open_checkpoint
from qkit.models.loaded import Source, facts_of
from qkit.models.sniff import FOLDER
from qkit.nn import QUANTIZED, Entry, QLayer, swap, tree
from qkit.nn.names import opened_state
from qkit.numerics import QParams, QTensor, check_finite, code_dtype, dequantize, quantize_minmax
from qkit.packing import tensor_specs, to_tensors
from qkit.packing.store import Stored, matrix_shape
from qkit.report import LayerRow, Report, coverage
from qkit.report.metrics import sqnr_db
from qkit.spec import PerTensor, QSpec, Recipe, Scheme
from qkit.targets.artifact import CHECK, write_meta
from qkit.targets.shards import ShardWriter
from qkit.targets.staging import as_output_error, check_destination, staged
from qkit.targets.torch import copy_config
from qkit.targets.weights import describe_weights, save_tensors

# Values in a block: what the caches of a processor hold.
BLOCK = 1 << 20
# The error of a weight is measured on the first rows of each block, about this many values.
SAMPLE = 1 << 16
SAMPLED = (
    f"streamed: outputs were not compared; the SQNR of a weight is that of a sample, the first "
    f"rows (about {SAMPLE} values) of every {BLOCK} values, and the error that of the worst"
)
# One tensor of a layer that is not cut into rows.
WHOLE = ("weight_shape", "weight_levels")


def stream_file(
    request: Request,
    *,
    shard_bytes: int | None = None,
    progress: Progress = no_progress,
    told: Callable[[str], None] = lambda text: None,
) -> Report:
    """Quantize the checkpoint ``request.path`` without holding it in memory; return the report.

    ``shard_bytes`` is the greatest size of a file of weights (None: one file). ``progress`` counts
    MiB of the source. The artifact is verified in a fresh process, which runs every quantized
    weight from disk; the errors of the rows are those of a sample (the report says which).

    Raises :class:`~qkit.errors.RequestError` or :class:`~qkit.errors.UsageError`, before anything
    is read, for what needs the model or data, and what :func:`qkit.models.checkpoint` and
    :func:`qkit.flows.quantize_file` raise; nothing is left at the output then.
    """
    start = time.perf_counter()
    scheme, recipe = _resolve(request)
    out = Path(request.output or default_output(request.path, scheme.name))
    check_destination(out, overwrite=request.overwrite)
    told(scheme.long_form())
    source = open_checkpoint(request.path, trust=request.trust_pickle)
    model = tree(source.metas)
    plans = plan_layers(model, recipe)
    told(f"opened {request.path}: {source.kind}, {len(source)} tensors")
    report = new_report(scheme, request.target, recipe, [_expected_row(plan) for plan in plans])
    check_budgets(report, min_coverage=request.min_coverage)
    with staged(out, overwrite=request.overwrite) as folder, _hashing(source.files) as hashes:
        work = _Work(source, model, plans)
        with as_output_error(out):
            writer = ShardWriter(folder, work.stored, shard_bytes)
        report.layers = work.run(writer, progress)
        report.coverage = coverage(report.layers)
        fill_weight_error(report, SAMPLED)
        check_budgets(report, min_sqnr=request.min_sqnr)
        seconds = time.perf_counter() - start
        about = Source(request.path, source.kind, hashes.result(), source.notes)
        if source.kind == FOLDER:
            copy_config(Path(request.path), folder)
        save_tensors(work.checks, folder / CHECK)
        write_meta(folder, head(report, about, None) | work.facts)
        told(f"verifying {out} in a fresh process")
        result = verify(folder)
        report.remarks += [*source.notes, f"{work.megabytes / seconds:.0f} MB/s of the source"]
        complete(report, result, folder, about, out, start)
    return report


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Future[dict[str, Any]]]:
    """The facts of the source's files, found by a thread that ends with the block."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(facts_of, files, stop)
        finally:
            stop.set()


def _resolve(request: Request) -> tuple[Scheme, Recipe]:
    """The scheme and recipe, refused where the model or data would be needed."""
    given = {"--model": request.model, "--input": request.input, "--calib": request.calib,
             "--dry-run": request.dry_run}  # fmt: skip
    if names := [name for name, value in given.items() if value]:
        raise UsageError(
            "a checkpoint that is streamed is not run, and not without writing",
            got=", ".join(names),
            fix="leave out --stream",
        )
    if request.format != "qkit":
        raise UsageError(
            "--stream writes qkit's own format", got=request.format, fix="leave out --stream"
        )
    scheme, recipe = resolve_request(request)
    for each in (rule.scheme for rule in recipe.rules if rule.scheme is not None):
        if obstacle := _obstacle(each):
            raise RequestError(
                f"{each.name} cannot be streamed: {obstacle}",
                wanted="a data-free scheme with scales for each row or group",
                fix="leave out --stream, or take w8a16 or w4a16-g128",
            )
    return scheme, recipe


def _obstacle(scheme: Scheme) -> str | None:
    if scheme.weight.is_cast:
        return "casts are not streamed"
    if isinstance(scheme.weight.granularity, PerTensor):
        return "the scale of a whole tensor is known only once all of it is read"
    if scheme.input is not None and scheme.input.when == "static":
        return "static ranges of activations are learnt from data"
    return None


def _expected_row(plan: Plan) -> LayerRow:
    """The row of a layer before it is quantized, for the coverage."""
    scheme = plan.rule.scheme.name if plan.rule and plan.rule.scheme else None
    return replace(left_row(plan.entry, plan.reason), scheme=scheme)


@dataclass
class _Layer:
    """A weight to quantize: how, its name, and the layer that it becomes."""

    entry: Entry
    scheme: str
    algorithm: str
    weight: str
    layer: QLayer


class _Work:
    """What is read, what is written, and under which names.

    ``stored`` are the tensors of the artifact and ``facts`` what ``qkit.json`` says about them:
    those of the quantized model, which is built on the meta device. ``before`` has the names in
    the source of tensors whose module is opened.
    """

    def __init__(self, source: Checkpoint, model: nn.Module, plans: list[Plan]) -> None:
        self.source, self.plans = source, plans
        self.layers: dict[str, _Layer] = {}
        made: dict[str, QLayer] = {}
        for plan in plans:
            if plan.rule is None or plan.rule.scheme is None:
                continue
            module: Any = plan.entry.module
            scheme, name = plan.rule.scheme, plan.entry.name
            made[name] = QUANTIZED[type(module)](module, scheme.weight, scheme.input)
            if plan.entry.tied_to is not None:
                made[name].share_weight(made[plan.entry.tied_to])
            else:
                self.layers[name] = _Layer(
                    plan.entry, scheme.name, plan.rule.algorithm, join(name, "weight"), made[name]
                )
        tensors, self.facts = describe_weights(swap(model, made))
        self.stored = {n: Stored(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        codes = {
            join(name, key) for name, each in self.layers.items() for key in _names(each.layer)
        }
        self.copied = [name for name in tensors if name not in codes]
        moved, _ = opened_state(source.metas, {})
        self.before = {new: old for old, new in moved.items()}
        self.biases = {join(name, "bias") for name in made}
        self.checks: dict[str, Tensor] = {}
        read = [*self.copied, *(each.weight for each in self.layers.values())]
        sizes = (source.entries[self.before.get(name, name)].meta for name in read)
        self.megabytes = sum(t.numel() * t.element_size() for t in sizes) / 1e6
        self._buffer = torch.empty(BLOCK * 8, dtype=torch.uint8)
        self._codes = torch.empty(BLOCK, dtype=torch.uint8)

    def run(self, writer: ShardWriter, progress: Progress) -> list[LayerRow]:
        """Write every tensor; return the rows of the report."""
        rows: dict[str, LayerRow] = {}
        done, total = 0, max(1, round(self.megabytes * 1e6 / 2**20))

        def step(name: str, block: Tensor) -> None:
            nonlocal done
            done += block.numel() * block.element_size()
            progress(min(done >> 20, total), total, name)

        for name in self.copied:
            self._copy(name, writer, step)
        for plan in self.plans:
            name, tied = plan.entry.name, plan.entry.tied_to
            if name in self.layers:
                rows[name] = self._quantize(self.layers[name], writer, step)
            elif plan.rule is not None and tied is not None:
                rows[name] = tied_row(plan.entry, rows[tied])
                self.checks[f"layers.{name}"] = self.checks[f"layers.{tied}"]
            else:
                rows[name] = left_row(plan.entry, plan.reason)
        progress(total, total, "")
        writer.finish()
        return list(rows.values())

    def _copy(self, name: str, writer: ShardWriter, step: Callable[[str, Tensor], None]) -> None:
        offset = 0
        for _, block in self._blocks(name):
            (check_finite if name in self.biases else check_damage)(block, name)
            writer.write(name, offset, block)
            offset += block.numel() * block.element_size()
            step(name, block)

    def _quantize(
        self, each: _Layer, writer: ShardWriter, step: Callable[[str, Tensor], None]
    ) -> LayerRow:
        layer, spec, entry = each.layer, each.layer.spec, each.entry
        columns = matrix_shape(layer.weight_size)[1]
        signal = noise = bits = 0.0
        outputs, note = [], None
        for start, block in self._blocks(each.weight):
            x = block.flatten(1).contiguous()
            x = x if x.dtype in (torch.float32, torch.float64) else x.float()  # exact
            q = quantize_minmax(x, spec, name=each.weight, out=self._codes_for(x, spec))
            tensors = to_tensors(q, (len(block), *layer.weight_size[1:]))
            for key, values in tensors.items():
                if key not in WHOLE:
                    row = values.numel() // len(block) * values.element_size()
                    writer.write(join(entry.name, key), start * row, values)
            outputs.append(weight_output(tensors, columns, spec))
            some = max(1, SAMPLE // columns)
            good, bad = _powers(x[:some], _rows(q, some))
            signal, noise, bits = signal + good, noise + bad, bits + q.bits_per_weight * x.numel()
            note = short_group(q)
            step(each.weight, block)
        tensors["weight_shape"] = torch.tensor(layer.weight_size, dtype=torch.int64)
        for key in WHOLE:
            if key in _names(layer):
                writer.write(join(entry.name, key), 0, tensors[key])
        self.checks[f"layers.{entry.name}"] = torch.cat(outputs, dim=-1)
        bits /= math.prod(layer.weight_size)
        value = sqnr_db(signal, noise)
        return quantized_row(entry, each.scheme, each.algorithm, bits, value, note)

    def _blocks(self, name: str) -> Iterator[Any]:
        """The rows of the tensor that is written as ``name``, some at a time."""
        return self.source.blocks(self.before.get(name, name), BLOCK, self._buffer)

    def _codes_for(self, x: Tensor, spec: QSpec) -> Tensor | None:
        """Memory for the codes of ``x``, the same for every block that fits."""
        if x.numel() > BLOCK:
            return None
        return self._codes[: x.numel()].view(code_dtype(spec.format)).view(x.shape)


def _names(layer: QLayer) -> list[str]:
    """The tensors that a weight is stored as."""
    return list(tensor_specs(layer.weight_size, layer.spec, layer.acts))


def _rows(q: QTensor, count: int) -> QTensor:
    """The first rows of a matrix whose rows have scales of their own."""
    scale, zero = q.qparams.scale, q.qparams.zero_point
    return QTensor(
        q.codes[:count], QParams(scale[:count], None if zero is None else zero[:count]), q.spec
    )


def _powers(x: Tensor, q: QTensor) -> tuple[float, float]:
    """The power of the weight, and that of its error."""
    error = dequantize(q) - x.float()
    return (
        float(x.float().square().sum(dtype=torch.float64)),
        float(error.square_().sum(dtype=torch.float64)),
    )
