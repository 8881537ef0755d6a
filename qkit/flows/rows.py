"""The rows of a report: what became of each module, and the remarks that a row makes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qkit.nn import Entry
from qkit.numerics import QTensor
from qkit.report import LayerRow
from qkit.spec import QSpec, Scheme


def quantized_row(
    entry: Entry,
    scheme: str,
    algorithm: str,
    bits_per_weight: float,
    sqnr_db: float | None,
    note: str | None,
) -> LayerRow:
    """The row of a module that is quantized."""
    return LayerRow(
        entry.name,
        entry.kind,
        entry.shape,
        entry.parameters,
        scheme=scheme,
        algorithm=algorithm,
        bits_per_weight=round(bits_per_weight, 4),
        sqnr_db=sqnr_db if sqnr_db is None else round(sqnr_db, 3),
        note=note,
    )


def tied_row(entry: Entry, scheme: str | None, first: LayerRow) -> LayerRow:
    """The row of a module whose weight is that of the module of the row ``first``."""
    return replace(
        first,
        name=entry.name,
        kind=entry.kind,
        scheme=scheme,
        parameters=entry.parameters,
        note=f"tied to {entry.tied_to}",
    )


def left_row(entry: Entry, reason: str | None) -> LayerRow:
    """The row of a module that stays in float."""
    return LayerRow(entry.name, entry.kind, entry.shape, entry.parameters, reason=reason)


def notes(*parts: str | None) -> str | None:
    """The remarks of a row as one."""
    return "; ".join(filter(None, parts)) or None


# Only the weight of a table follows the scheme that was asked for.
INDICES = "its input is indices: the weight alone is quantized"


def exact_input(asked: Scheme, done: Scheme) -> str | None:
    """That only the weight of a layer follows the scheme that was asked for."""
    return None if asked == done else INDICES


def short_group(q: QTensor) -> str | None:
    """A group size that does not divide the row is legal, and said."""
    size, columns = q.spec.group_size, q.shape[1]
    if size == 0 or columns % size == 0:
        return None
    if columns < size:
        return f"one group of {columns} a row"
    return f"last group of each row has {columns % size}"


def zeroed(weight: Tensor, decoded: Tensor, spec: QSpec) -> int:
    """How many values a cast without a scale lost; those that are too large, it refuses."""
    return int(((decoded == 0) & (weight != 0)).sum()) if spec.is_cast else 0


def underflow(lost: int) -> str | None:
    """What a row says of them."""
    return f"{lost} values became zero" if lost else None
