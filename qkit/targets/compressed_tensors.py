"""The compressed-tensors format: a Hugging Face folder that other tools load without qkit.

``config.json`` gains a ``quantization_config``, and each quantized ``nn.Linear`` is stored as

=====================  ======  ================================================================
``weight_packed``      int32   ``[rows, ceil(columns * bits / 32)]``, see :mod:`qkit.packing.bits`
``weight_shape``       int64   ``[2]``
``weight_scale``       float   ``[rows, G]``; ``[1]`` per tensor
``weight_zero_point``  int32   ``[ceil(rows * bits / 32), G]``, packed along the rows (affine);
                               int8 ``[1]`` per tensor
=====================  ======  ================================================================

(``pack-quantized``), or, where activations are int8 too, as int8 ``weight``, ``weight_scale`` and
int8 ``weight_zero_point`` in the shapes of :mod:`qkit.packing.store` (``int-quantized``). It is
``(code - zero point) * scale`` in both formats, with any sign of the scale, so moving codes there
and back rounds nothing. The layouts are those of compressed-tensors 0.20.

``"dequantize": true`` in the configuration makes transformers unpack the weights while it loads
them. Otherwise it would do so at the first call of the whole model, which ``generate`` of an
encoder-decoder never makes, and it would expect zero points that are not packed.

It also decides what becomes of ``input_activations``. With ``true`` transformers never applies
the configuration to the model, and activations stay exact: so the folders of weight-only schemes
say. With ``false``, of ``w8a8``, compressed-tensors rounds the input of each layer to -128..127
with the scale ``max|x| / 127.5``; so do qkit's layers of this format (:func:`as_stored`). An input
of two dimensions it rounds as a whole, not row by row: layers with such inputs stay in float.
Encoder-decoders are refused under ``w8a8``, for the reason above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.nn import Entry
from qkit.numerics import QParams, QTensor
from qkit.packing import pack, packed_words, to_tensors, unpack
from qkit.packing.store import Stored, matrix_shape
from qkit.spec import BF16, FP16, FP32, Float, Int, PerTensor, QSpec, Scheme
from qkit.targets import COMPRESSED
from qkit.targets.artifact import LayerFacts

_SCALES: dict[torch.dtype | None, Float] = {torch.float16: FP16, torch.bfloat16: BF16}


def layer_obstacle(entry: Entry, scheme: Scheme) -> str | None:
    """Why the format cannot hold the layer ``entry`` under ``scheme``; None where it can."""
    if entry.note is not None:
        return f"transformers computes its weight ({entry.note} here)"
    if entry.inside is not None or type(entry.module) is not nn.Linear:
        return f"compressed-tensors folders have no quantized {entry.inside_kind or entry.kind}"
    if entry.tied_to is not None:
        return f"shares its weight with {entry.tied_to}, which transformers ties in float only"
    size, columns = scheme.weight.group_size, entry.module.in_features
    words = packed_words(entry.module.out_features, scheme.weight.format.bits)
    packed_zeros = scheme.input is None and not scheme.weight.symmetric
    if packed_zeros and scheme.weight.format.bits == 4 and words == 1 and columns > size > 0:
        # Its view of the one word of zero points as bytes fails (seen in 0.20).
        return "compressed-tensors cannot unpack the zero points of 8 rows or fewer"
    if size and columns % size:
        return f"its {columns} columns are no multiple of {size}: compressed-tensors needs that"
    return None


def as_stored(model: nn.Module) -> Callable[[Scheme], Scheme]:
    """What the format makes of a scheme: scales in the dtype of ``model``, in which every reader
    keeps them, and int8 activations in -128..127."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def change(scheme: Scheme) -> Scheme:
        scheme = scheme.with_scale(_SCALES.get(dtype, FP32))
        acts = scheme.input and replace(scheme.input, format=Int(8))
        return replace(scheme, input=acts)

    return change


def format_name(acts: QSpec | None) -> str:
    """The name of the layout, by how the layer quantizes its input."""
    return "pack-quantized" if acts is None else "int-quantized"


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says: every ``Linear`` is under ``scheme`` but those in ``ignore``."""
    spec, acts = scheme.weight, scheme.input
    grain: dict[str, Any] = {"strategy": "tensor" if spec.granularity == PerTensor() else "channel"}
    if spec.group_size:
        grain = {"strategy": "group", "group_size": spec.group_size}
    integer = {"type": "int", "dynamic": False, "symmetric": spec.symmetric}
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": spec.format.bits} | integer | grain,
        "input_activations": acts
        and {"num_bits": acts.format.bits, "type": "int", "symmetric": True}
        | {"strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": format_name(acts),
    }
    return {
        "quant_method": COMPRESSED,
        "format": format_name(acts),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "dequantize": acts is None,
    }


def layout(shape: tuple[int, ...], spec: QSpec, acts: QSpec | None) -> dict[str, Stored]:
    """Which tensors a weight of ``shape`` is stored as."""
    rows, columns = matrix_shape(shape)
    whole, bits = spec.granularity == PerTensor(), spec.format.bits
    scales = (1,) if whole else spec.granularity.scale_shape((rows, columns))
    dtype = getattr(torch, (spec.scale or FP32).torch_name)
    stored = {"weight_scale": Stored(scales, dtype)}
    packed = acts is None and not whole
    if not spec.symmetric:
        words = (packed_words(rows, bits), scales[-1])
        stored["weight_zero_point"] = (
            Stored(words, torch.int32) if packed else Stored(scales, torch.int8)
        )
    if acts is not None:
        return {"weight": Stored(shape, torch.int8)} | stored
    return {
        "weight_packed": Stored((rows, packed_words(columns, bits)), torch.int32),
        "weight_shape": Stored((2,), torch.int64),
    } | stored


def to_format(q: QTensor, acts: QSpec | None) -> dict[str, Tensor]:
    """The tensors of this format for the weight ``q``, by the names of :func:`layout`."""
    bits, zero = q.spec.format.bits, q.qparams.zero_point
    wanted = layout(q.shape, q.spec, acts)
    tensors = {"weight_scale": q.qparams.scale.reshape(wanted["weight_scale"].shape)}
    if zero is not None:
        as_words = wanted["weight_zero_point"].dtype == torch.int32
        tensors["weight_zero_point"] = (
            pack(zero, bits, axis=0)
            if as_words
            else zero.reshape(wanted["weight_zero_point"].shape)
        )
    if acts is not None:
        return {"weight": q.codes} | tensors
    return {
        "weight_packed": pack(q.codes, bits),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    } | tensors


def from_format(tensors: Mapping[str, Tensor], facts: LayerFacts, *, name: str) -> QTensor:
    """The weight that :func:`to_format` stored.

    Raises :class:`~qkit.errors.InputError` if a tensor is missing or has another shape or dtype.
    """
    spec, bits = facts.spec, facts.spec.format.bits
    wanted = layout(facts.shape, spec, facts.acts)
    for key, want in wanted.items():
        have = tensors.get(key)
        if have is None or (tuple(have.shape), have.dtype) != (want.shape, want.dtype):
            raise InputError(
                "the stored tensors do not fit the layer",
                where=f"{name}.{key}",
                got="nothing" if have is None else f"{have.dtype} {tuple(have.shape)}",
                wanted=f"{want.dtype} {want.shape}",
            )
    rows, columns = matrix_shape(facts.shape)
    scales = spec.granularity.scale_shape((rows, columns))
    zero = None if spec.symmetric else tensors["weight_zero_point"]
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack(zero, bits, rows, axis=0)
    codes = (
        unpack(tensors["weight_packed"], bits, columns) if facts.acts is None else tensors["weight"]
    )
    scale = tensors["weight_scale"].reshape(scales)
    return QTensor(codes, QParams(scale, zero if zero is None else zero.reshape(scales)), spec)


def to_own_layout(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerFacts]
) -> dict[str, Tensor]:
    """All tensors of a folder, those of its quantized layers as qkit's own artifacts have them."""
    own = dict(tensors)
    for name, facts in layers.items():
        stored = {
            key: own.pop(f"{name}.{key}")
            for key in layout(facts.shape, facts.spec, facts.acts)
            if f"{name}.{key}" in own
        }
        q = from_format(stored, facts, name=name)
        own |= {f"{name}.{key}": t for key, t in to_tensors(q, facts.shape).items()}
    return own
