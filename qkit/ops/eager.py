"""The eager call of a layer without torch's dispatcher.

An operator that is implemented in Python costs some 15 microseconds a call, several times the
work of a small layer. Where nobody watches or records the call (no gradient, no tracing, no
compiler, no mode, no profiler), a layer calls the kernels itself, with pointers that it keeps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkit import native as library
from qkit.ops import convolutions, native

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
        self.of: tuple[tuple | None, Any] = (None, None)

    def __deepcopy__(self, memo: dict) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def linear(
    name: str,
    kept: Kept,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    third: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    *acts: Any,
) -> Tensor | None:
    """The operator ``name``, one of the linear ones, on the kernels; None where it has to go
    through the dispatcher. ``third`` is the zero point, or the levels of a codebook.
    """
    if x.dtype not in native.TYPES or x.ndim == 0:
        return None
    book = name == "linear_codebook"
    stored = _found(kept, x, (weight, scale, third, bias), bits, group, x.shape[-1], book)
    kernels = library.library()
    if stored is None or kernels is None:
        return None
    rounded = native.ACTS[name](*acts)
    if rounded is None:
        return None
    if counters:
        count(name, library.isa())
    return native.multiply(kernels, x, stored, rounded)


def convolve(
    kept: Kept,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    kernel: list[int],
    *geometry: Any,
) -> Tensor | None:
    """``convolution`` with the kernels; None where it has to go through the dispatcher."""
    if x.dtype not in native.TYPES:
        return None
    columns = x.shape[-1 - len(kernel)] // geometry[3] * math.prod(kernel)
    # The bias goes to torch, not to the kernels; a change of it is not of interest.
    stored = _found(kept, x, (weight, scale, zero_point, None), bits, group, columns)
    kernels = library.library()
    if stored is None or kernels is None or _needs_gradient(bias):
        return None
    if counters:
        count("convolution", library.isa())
    return convolutions.run(kernels, stored, x, bias, kernel, geometry)


def embedding(
    kept: Kept,
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """``embedding`` with the kernels; None where it has to go through the dispatcher."""
    if indices.dtype not in native.INDICES or dtype not in native.TYPES:
        return None
    tensors = weight, scale, zero_point, None
    stored = _found(kept, indices, tensors, bits, group, columns, whole=False)
    kernels = library.library()
    rows = (
        None
        if stored is None or kernels is None
        else native.look_up(kernels, stored, indices, dtype)
    )
    if rows is not None and counters:
        count("embedding", library.isa())
    return rows


def kept_floats(
    kept: Kept, tensors: tuple[Tensor | None, ...], dtype: torch.dtype, make: Callable[[], Tensor]
) -> Tensor:
    """What ``make`` gives, from the call before if none of the stored ``tensors`` has changed."""
    key = (dtype, *map(_identity, tensors))
    known, floats = kept.of
    if key != known:
        floats = make()
        kept.of = key, floats
    if counters:
        count("convolution", "kept weight")
    return floats


def _found(
    kept: Kept,
    x: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    bits: int,
    group: int,
    columns: int,
    book: bool = False,
    whole: bool = True,
) -> native.Stored | None:
    """The stored weight as the kernels take it; None if ``x`` is not for a direct call.

    ``whole`` if each call reads all of it.
    """
    weight, scale, third, bias = tensors
    if type(x) is not Tensor or x.device.type != "cpu" or _watched(x, bias):
        return None
    if library.library() is None:
        return None
    key = _identity(weight), _identity(scale), _identity(third), _identity(bias)
    known, stored = kept.of
    if key != known:
        before = stored.weight.codes if isinstance(stored, native.Stored) else None
        zero_point, levels = (None, third) if book else (third, None)
        stored = native.stored(weight, scale, zero_point, bias, bits, group, columns, levels)
        if whole and stored is not None and stored.weight.codes != before:
            native.keep(library.library(), stored)
        kept.of = key, stored
    return None if stored is None or stored.columns != columns else stored


def _needs_gradient(t: Tensor | None) -> bool:
    return torch.is_grad_enabled() and t is not None and t.requires_grad


def _watched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether somebody has to see the call."""
    if _needs_gradient(x) or _needs_gradient(bias):
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
