"""The eager call of a linear layer without torch's dispatcher.

An operator that is implemented in Python costs some 15 microseconds a call, several times the
product of a small layer. Where nobody watches or records the call (no gradient, no tracing, no
compiler, no mode, no profiler), a layer calls the kernels itself, with pointers that it keeps.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from qkit import native as library
from qkit.ops import native
from qkit.spec import Int, QSpec

# Who counts calls at the moment: see qkit.ops.count_calls.
counters: list[Counter[str]] = []


def count(name: str, ran: str | None) -> None:
    """Tell everyone who counts that the operator ``name`` ran."""
    for counter in counters:
        counter[f"qkit::{name}[{ran or 'reference'}]"] += 1


class Kept:
    """What a layer keeps between calls: pointers, which belong to no copy of the layer."""

    __slots__ = ("of",)

    def __init__(self) -> None:
        # One attribute, set at once: other threads may call the layer.
        self.of: tuple[tuple | None, native.Stored | None] = (None, None)

    def __deepcopy__(self, memo: dict) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def call(
    kept: Kept,
    name: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    third: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    acts: QSpec | None = None,
    static: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor | None:
    """The operator ``name`` on the kernels; None where it has to go through the dispatcher.

    ``third`` is the zero point, or the levels of a codebook; ``acts`` how the input is quantized,
    if it is, and ``static`` its scale and zero point where they are known.
    """
    if (
        type(x) is not Tensor
        or x.dtype not in native.TYPES
        or x.device.type != "cpu"
        or _watched(x, bias)
    ):
        return None
    kernels = library.library()
    if kernels is None:
        return None
    key = tuple(_identity(t) for t in (weight, scale, third, bias))
    known, stored = kept.of
    if key != known:
        book = name == "linear_codebook"
        zero_point, levels = (None, third) if book else (third, None)
        columns = x.shape[-1]
        stored = native.stored(weight, scale, zero_point, bias, bits, group, columns, levels)
        kept.of = key, stored
    if stored is None or stored.columns != x.shape[-1]:
        return None
    if counters:
        count(name, library.isa())
    if static is None:
        return native.multiply(kernels, x, stored, native.acts_of(acts))
    assert acts is not None
    assert isinstance(acts.format, Int)
    return native.multiply(kernels, x, stored, native.static_acts(acts.format, *static))


def _watched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether somebody has to see the call."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_function_stack() > 0
        or x.is_neg()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


_COPIED = (torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def _identity(t: Tensor | None) -> tuple | None:
    """What changes whenever the values, the memory or the kind of ``t`` may have changed."""
    if t is None:
        return None
    # Looked at anew each time: a tensor of inference mode, which does not count its changes, and
    # one that the kernels read as a copy, which neither sees a change through ``.data`` nor keeps
    # the memory from being given to another tensor.
    copied = t.dtype in _COPIED or not t.is_contiguous()
    version = object() if copied or t.is_inference() else t._version
    return id(t), t.data_ptr(), version, t.shape, t.dtype
