"""Casting a whole model to a narrower float, with what that loses told for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkit.errors import CoverageError
from qkit.flows.ptq import Progress, check_damage, check_tensors, copied, no_progress
from qkit.flows.rows import underflow
from qkit.numerics import CastLoss, cast
from qkit.report import LayerRow
from qkit.report.metrics import sqnr_db
from qkit.spec import Float


def cast_module(
    model: nn.Module, fmt: Float, *, in_place: bool = False, progress: Progress = no_progress
) -> tuple[nn.Module, list[LayerRow]]:
    """``model`` with every float tensor cast to ``fmt``, and one row for each parameter tensor.

    Raises :class:`~qkit.errors.RequestError` with the count for values that are too large,
    :class:`~qkit.errors.InputError` for those that are not finite.
    """
    check_tensors(model)
    if not in_place:
        model = copied(model, [])
    tensors = [*model.named_parameters(), *model.named_buffers()]
    rows = []
    for done, (name, tensor) in enumerate(tensors):
        progress(done, len(tensors), name)
        if not tensor.is_floating_point():
            continue
        low, loss, signal, noise = cast_rows(tensor.detach(), fmt, name)
        if isinstance(tensor, nn.Parameter):
            value = sqnr_db(signal, noise)
            rows.append(cast_row(name, tuple(tensor.shape), fmt, value, loss))
        tensor.data = low
    progress(len(tensors), len(tensors), "")
    if not rows:
        raise nothing_cast()
    # Also what modules keep beside their tensors, such as the packed weights of an LSTM.
    return model.to(getattr(torch, fmt.torch_name)), rows


def cast_rows(x: Tensor, fmt: Float, name: str) -> tuple[Tensor, CastLoss, float, float]:
    """``x``, or some of its rows, cast; what that lost, the power of ``x`` and that of its error.

    Infinity, which may be a mask, stays what it is and counts for nothing; NaN is damage.
    """
    check_damage(x, name)
    finite = torch.isfinite(x.float())
    masked = fmt.has_inf and not finite.all()
    known = torch.where(finite, x, 0) if masked else x
    low, loss = cast(known, fmt, name=name)
    wide = known.float()
    signal = float(wide.square().sum(dtype=torch.float64))
    noise = float((low.float() - wide).square_().sum(dtype=torch.float64))
    return (torch.where(finite, low, x.to(low.dtype)) if masked else low), loss, signal, noise


def cast_row(
    name: str, shape: tuple[int, ...], fmt: Float, sqnr_db: float | None, loss: CastLoss
) -> LayerRow:
    """The row of a tensor that is cast."""
    error = f"off by at most {loss.max_error:.2g}" if loss.max_error else None
    return LayerRow(
        name,
        "Parameter",
        shape,
        torch.Size(shape).numel(),
        scheme=str(fmt),
        bits_per_weight=float(fmt.bits),
        sqnr_db=sqnr_db if sqnr_db is None else round(sqnr_db, 3),
        note="; ".join(filter(None, (error, underflow(loss.underflow)))) or None,
    )


def nothing_cast() -> CoverageError:
    """A model without weights to cast."""
    return CoverageError("nothing was cast: the model has no float parameters")
