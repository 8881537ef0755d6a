"""One tensor of a checkpoint, some rows at a time: read, quantized, written to its place.

Memory holds one block of rows and what it becomes. Tensors are independent of each other, so that
several threads may each work on one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Event, Lock

import torch
from torch import Tensor

from qkit.flows.casts import cast_row, cast_rows
from qkit.flows.check import NO_SUMS, sums, weight_output
from qkit.flows.ptq import check_damage
from qkit.flows.rows import notes, quantized_row, short_group, underflow, zeroed
from qkit.models.checkpoint import BLOCK, Checkpoint
from qkit.nn import Entry, QLayer
from qkit.numerics import (
    CastLoss,
    QParams,
    QTensor,
    cast_codes,
    check_finite,
    code_dtype,
    dequantize,
    quantize,
    quantize_minmax,
)
from qkit.numerics.affine import qparams_from_range
from qkit.numerics.blocks import block_range
from qkit.packing import tensor_specs, to_tensors
from qkit.packing.store import join, matrix_shape
from qkit.report import LayerRow
from qkit.report.metrics import sqnr_db
from qkit.spec import Float, PerTensor, QSpec
from qkit.targets.shards import ShardWriter, TensorFile

# The error of a weight is measured on the first rows of each block, about this many values.
SAMPLE = 1 << 16
# Tensors of a layer that are the same for all rows.
WHOLE = ("weight_shape", "weight_levels")


class Stopped(Exception):
    """Another part of the run has failed, or the user has interrupted it."""


@dataclass
class Layer:
    """A weight to quantize: how, its name in the source, the layer that it becomes, the layers
    (this one first) whose outputs are checked with it, because they share it, and a remark."""

    entry: Entry
    scheme: str
    algorithm: str
    weight: str
    layer: QLayer
    owners: list[str]
    note: str | None = None

    @property
    def stored(self) -> list[str]:
        """The full names of the tensors that the weight is stored as."""
        keys = tensor_specs(self.layer.weight_size, self.layer.spec, self.layer.acts)
        return [join(self.entry.name, key) for key in keys]


@dataclass
class Cast:
    """A tensor to cast to ``fmt`` (None: to write as it is), and all its names."""

    name: str
    fmt: Float | None
    owners: list[str]


class Pieces:
    """What the threads of a run share: where to read and to write, and how far they are.

    ``exact`` asks for the error of all values instead of a sample.
    """

    def __init__(
        self, source: Checkpoint, weights: ShardWriter, checks: TensorFile, *, exact: bool
    ) -> None:
        self.source, self.weights, self.checks = source, weights, checks
        self._exact = exact
        self._lock = Lock()
        self.read_bytes, self.earlier_bytes = 0, 0
        self.stop = Event()

    def reached(self) -> float:
        """How much of the source is read, in this run and earlier ones; infinity at the end."""
        return math.inf if self.stop.is_set() else self.earlier_bytes + self.read_bytes

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        self.weights.sync()
        self.checks.sync()

    def copy(self, name: str, *, finite: bool) -> None:
        """Write the tensor ``name`` as it is; NaN, and if ``finite`` infinity, is refused."""
        offset = 0
        for _, block in self.source.blocks(name, BLOCK, _buffer()):
            (check_finite if finite else check_damage)(block, name)
            self.weights.write(name, offset, block)
            offset += block.numel() * block.element_size()
            self._step(block)

    def cast(self, each: Cast) -> LayerRow | None:
        """Write a tensor cast to its format; return its row, if that changes it."""
        name, offset, total = each.name, 0, NO_SUMS
        signal = noise = 0.0
        loss = CastLoss(0, 0)
        for _, block in self.source.blocks(name, BLOCK, _buffer()):
            low = block
            if each.fmt is not None:
                low, part, good, bad = cast_rows(block, each.fmt, name)
                loss, signal, noise = loss + part, signal + good, noise + bad
            self.weights.write(name, offset, low)
            offset += low.numel() * low.element_size()
            total = total + sums(low)
            self._step(block)
        for owner in each.owners:
            self.checks.write(f"layers.{owner}", 0, total)
        if each.fmt is None:
            return None
        shape = tuple(self.source.entries[name].meta.shape)
        return cast_row(name, shape, each.fmt, sqnr_db(signal, noise), loss)

    def quantize(self, each: Layer) -> LayerRow:
        """Write the tensors of a quantized weight and what it computes; return its row."""
        layer, spec, entry = each.layer, each.layer.spec, each.entry
        rows, columns = matrix_shape(layer.weight_size)
        one_scale = isinstance(spec.granularity, PerTensor) and not spec.is_cast
        common = self._range(each.weight, spec) if one_scale else None
        whole = {*WHOLE, *(("weight_scale", "weight_zero_point") if one_scale else ())}
        signal = noise = bits = 0.0
        lost, short = 0, None
        buffer, codes = _buffer(), torch.empty(BLOCK, dtype=torch.uint8)
        for start, block in self.source.blocks(each.weight, BLOCK, buffer):
            x = _matrix(block)
            q = _codes(x, spec, common, each.weight, codes)
            tensors = to_tensors(q, (len(block), *layer.weight_size[1:]))
            for key, values in tensors.items():
                if key not in whole:
                    row = values.numel() // len(block) * values.element_size()
                    self.weights.write(join(entry.name, key), start * row, values)
            outputs = weight_output(tensors, columns, spec)
            for name in each.owners:
                for line, values in enumerate(outputs):
                    place = (line * rows + start) * values.element_size()
                    self.checks.write(f"layers.{name}", place, values)
            some = len(x) if self._exact or spec.is_cast else max(1, SAMPLE // columns)
            part, decoded = x[:some], dequantize(_first(q, some))
            signal, noise = signal + _power(part), noise + _power(decoded - part)
            lost += zeroed(part, decoded, spec)
            bits += q.bits_per_weight * x.numel()
            if one_scale and start:  # it is counted once
                bits -= (q.bits_per_weight - spec.format.bits) * x.numel()
            short = short_group(q)
            self._step(block)
        tensors["weight_shape"] = torch.tensor(layer.weight_size, dtype=torch.int64)
        stored = each.stored
        for key in whole & tensors.keys():
            if (full := join(entry.name, key)) in stored:
                self.weights.write(full, 0, tensors[key])
        bits, value = bits / (rows * columns), sqnr_db(signal, noise)
        note = notes(entry.note, short, each.note, underflow(lost))
        return quantized_row(entry, each.scheme, each.algorithm, bits, value, note)

    def _range(self, name: str, spec: QSpec) -> QParams:
        """The scale of a whole tensor, which is read once for it."""
        lo, hi = torch.zeros(1, 1), torch.zeros(1, 1)
        for _, block in self.source.blocks(name, BLOCK, _buffer()):
            check_finite(block, name)
            x = _matrix(block)
            low, high = block_range(x, tuple(x.shape))
            lo, hi = torch.minimum(low, lo.to(low.dtype)), torch.maximum(high, hi.to(high.dtype))
            self._check_stopped()
        return qparams_from_range(lo, hi, spec, name=name)

    def _step(self, block: Tensor) -> None:
        self._check_stopped()
        with self._lock:
            self.read_bytes += block.numel() * block.element_size()

    def _check_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped


def _buffer() -> Tensor:
    """Memory for a block of values of any type; pages that are not used take none."""
    return torch.empty(BLOCK * 8, dtype=torch.uint8)


def _matrix(block: Tensor) -> Tensor:
    """Rows of a weight as a matrix, in the type in which they are divided."""
    x = block.flatten(1).contiguous()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # exact


def _codes(x: Tensor, spec: QSpec, common: QParams | None, name: str, memory: Tensor) -> QTensor:
    """The codes of ``x``, with ``common`` scales or its own, in ``memory`` where they fit."""
    if spec.is_cast:
        return cast_codes(x, spec, name=name)
    out = None
    if x.numel() <= memory.numel():
        out = memory[: x.numel()].view(code_dtype(spec.format)).view(x.shape)
    if common is not None:
        return quantize(x, common, spec, out=out)
    return quantize_minmax(x, spec, name=name, out=out)


def _first(q: QTensor, count: int) -> QTensor:
    """The first rows of a matrix."""
    if isinstance(q.spec.granularity, PerTensor):
        return QTensor(q.codes[:count], q.qparams, q.spec)
    scale, zero = q.qparams.scale, q.qparams.zero_point
    return QTensor(
        q.codes[:count], QParams(scale[:count], None if zero is None else zero[:count]), q.spec
    )


def _power(x: Tensor) -> float:
    """The sum of the squares."""
    return float(x.float().square().sum(dtype=torch.float64))
