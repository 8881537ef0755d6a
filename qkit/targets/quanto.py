"""Folders that optimum-quanto wrote, read without it.

Such a folder holds safetensors and a *quantization map* (:data:`MAPS`) with the type of each
quantized layer: ``{"layer": {"weights": "qint8", "activations": "none"}}``. The layer has these
tensors in place of its ``weight`` ``[rows, ...]`` (and ``input_scale``, ``output_scale`` for
activations, which say nothing where those are not quantized):

===================  =======================================================================
``weight._data``     qint8, qfloat8: int8 or fp8, in the weight's own shape
``weight._scale``    float, ``rows`` values (a scalar for one row); ``value = scale * data``
``weight._data``     qint4, qint2: uint8 ``[ceil(N / p), ...]`` (under ``._data._data``) packs the
                     codes of ``[N, ...]``, p = 2 or 4 of them to a byte: byte ``r`` holds those
                     of the rows ``r + i * ceil(N / p)``, ``i`` = 0 in its lowest bits
``weight._scale``    float ``[N, 1, ...]``: for each row, or for each group of neighbours in it
                     (of a weight with one row and no groups ``[1, ..., columns]``)
``weight._shift``    the same shape; if float, ``value = scale * code - shift``; if
                     integer, ``value = scale * (code - shift)``
===================  =======================================================================

What qkit's formula says exactly becomes its own layer, with the same codes and scales: qint8,
qfloat8 (as a codebook), and qint4 or qint2 with integer shifts. quanto's own ``quantize`` makes
float shifts, which are no zero points: those weights are unpacked to the float values that quanto
computes with.
The layouts are those of optimum-quanto 0.2.7.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.models.factory import spread, ties_of
from qkit.models.folder import QUANTO_MAPS, read_tensors
from qkit.nn import QUANTIZED
from qkit.numerics import QParams, QTensor
from qkit.packing import to_tensors
from qkit.packing.store import matrix_shape
from qkit.spec import BF16, FP16, FP32, Codebook, Float, Int, PerChannel, PerGroup, QSpec, Scheme
from qkit.spec.plain import show, take
from qkit.targets import QUANTO
from qkit.targets.artifact import Artifact

# The types of weights, and the dtype of what is stored.
TYPES = {
    "qint8": torch.int8,
    "qint4": torch.uint8,
    "qint2": torch.uint8,
    "qfloat8_e4m3fn": torch.float8_e4m3fn,
    "qfloat8_e4m3fnuz": torch.float8_e4m3fnuz,
    "qfloat8_e5m2": torch.float8_e5m2,
}
BITS = {"qint4": 4, "qint2": 2}
LEAVES = ("_data", "_data._data", "_scale", "_shift")
_SCALES: dict[torch.dtype, Float] = {
    torch.float32: FP32,
    torch.float16: FP16,
    torch.bfloat16: BF16,
}


def map_of(folder: str | Path) -> Path | None:
    """The quantization map in ``folder``; None where it is no folder of quanto's."""
    return next((path for name in QUANTO_MAPS if (path := Path(folder, name)).is_file()), None)


def read_map(folder: Path) -> dict[str, str]:
    """The type of the weight of each layer of quanto's: one of :data:`TYPES`, or ``none``.

    Raises :class:`~qkit.errors.InputError` for a map that is corrupt, or a layer whose activations
    are quantized: qkit has no such layers.
    """
    path = map_of(folder)
    assert path is not None
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"the quantization map is corrupt: {error}", where=str(path)) from error
    if not isinstance(layers, dict):
        raise InputError("the quantization map is no table", where=str(path), got=show(layers))
    types = {}
    for name, facts in layers.items():
        kind, acts = take(facts, f"layer {name}", {"weights": str, "activations": str})
        if kind not in (*TYPES, "none"):
            raise InputError(
                "unknown type of a weight",
                where=f"{path}: {name}",
                got=kind,
                wanted=", ".join(TYPES),
            )
        if acts != "none":
            raise InputError(
                "qkit does not read layers whose activations optimum-quanto quantizes",
                where=f"{path}: {name}",
                got=acts,
                fix="load the folder with optimum-quanto",
            )
        types[name] = kind
    return types


def read_quanto(folder: Path, model: nn.Module) -> tuple[Artifact, dict[str, Tensor]]:
    """The folder as an artifact of qkit's for the architecture ``model``, and its tensors.

    ``model`` gives the shapes (its tensors may be on the meta device). Layers that are held as
    float are named in a warning. Raises :class:`~qkit.errors.InputError` for tensors that are
    missing, or do not fit the map or the model.
    """
    types = read_map(folder)
    tensors = spread(read_tensors(folder, trust=False), ties_of(model))
    own = dict(tensors)
    layers: dict[str, dict[str, Any]] = {}
    floats: dict[str, str] = {}
    for name, kind in types.items():
        prefix = f"{name}." if name else ""
        for leaf in ("input_scale", "output_scale"):
            own.pop(prefix + leaf, None)
        if kind == "none":
            continue
        module = _module(model, name, folder)
        shape = tuple(module.weight.shape)
        own.pop(f"{prefix}weight", None)  # that of a tie which the quantization has cut
        stored = {
            leaf: own.pop(f"{prefix}weight.{leaf}")
            for leaf in LEAVES
            if f"{prefix}weight.{leaf}" in tensors
        }
        weight = from_quanto(stored, kind, shape, name=f"{folder}: {name}")
        cls = QUANTIZED.get(type(module))
        if isinstance(weight, QTensor) and cls and not cls.lacks(Scheme(weight.spec)):
            own |= {f"{prefix}{key}": t for key, t in to_tensors(weight, shape).items()}
            layers[name] = {
                "class": cls.__name__,
                "shape": list(shape),
                "dtype": str(stored["_scale"].dtype).removeprefix("torch."),
                "spec": weight.spec.to_json(),
                "input": None,
            }
            continue
        floats[name] = kind
        own[f"{prefix}weight"] = (
            _values(stored, kind, shape) if isinstance(weight, QTensor) else weight
        )
    if floats:
        kinds = ", ".join(sorted(set(floats.values())))
        few = ", ".join([*floats][:3]) + (", ..." if len(floats) > 3 else "")
        warnings.warn(
            f"{len(floats)} of {len(floats) + len(layers)} quantized layers ({kinds}: {few}) are "
            "held in float: qkit has no layer with exactly these weights",
            stacklevel=2,
        )
    meta = {"target": QUANTO, "layers": layers, "aliases": {}, "buffers": []}
    return Artifact(folder, meta), own


def _module(model: nn.Module, name: str, folder: Path) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not isinstance(module._parameters.get("weight"), Tensor):
        raise InputError(
            f"the model has no layer {name!r} with a weight, the quantization map has",
            where=str(folder),
            fix="load into the architecture that was quantized",
        )
    return module


def from_quanto(
    stored: Mapping[str, Tensor], kind: str, shape: tuple[int, ...], *, name: str
) -> QTensor | Tensor:
    """The weight of ``shape`` that ``stored`` (by the names behind ``weight.``) holds.

    It is a matrix ``[rows, columns]`` of codes where these express it exactly; else the float
    values, of ``shape`` and in the dtype of the scales.

    Raises :class:`~qkit.errors.InputError` for tensors that are missing or do not fit.
    """
    rows, columns = matrix_shape(shape)
    key = "_data._data" if kind in BITS else "_data"
    data, scale = (_given(stored, leaf, name) for leaf in (key, "_scale"))
    if data.dtype != TYPES[kind] or not scale.is_floating_point():
        raise InputError(
            "the stored tensors are not those of the type in the quantization map",
            where=name,
            got=f"{data.dtype} data, {scale.dtype} scales",
            wanted=f"{kind}: {TYPES[kind]} data",
        )
    if kind in BITS:
        fits = _packed_fit(data, scale, _given(stored, "_shift", name), BITS[kind], shape)
    else:
        fits = tuple(data.shape) == shape and scale.numel() == rows
    if not fits:
        raise InputError(
            "the stored tensors do not fit the layer",
            where=name,
            got=", ".join(f"{leaf} {tuple(t.shape)}" for leaf, t in stored.items()),
            wanted=f"{kind} of a weight of shape {shape}",
        )
    stored_scale = _SCALES.get(scale.dtype)
    if stored_scale is None:
        return _values(stored, kind, shape)
    if kind in BITS:
        if stored["_shift"].is_floating_point() or scale.numel() != len(scale):
            return _values(stored, kind, shape)
        half = 1 << (BITS[kind] - 1)
        codes = _unpack(data, BITS[kind], len(scale)).to(torch.int8) - half
        groups = len(scale) // rows
        grain = PerChannel(0) if groups == 1 else PerGroup(columns // groups)
        spec = QSpec(Int(BITS[kind]), grain, symmetric=False, scale=stored_scale)
        zero = stored["_shift"].to(torch.int8).reshape(rows, groups) - half
        return QTensor(
            codes.reshape(rows, columns), QParams(scale.reshape(rows, groups), zero), spec
        )
    fmt: Int | Codebook = Int(8, narrow=int(data.min()) > -128) if kind == "qint8" else _book(kind)
    codes = data if kind == "qint8" else _places(data, name)
    spec = QSpec(fmt, PerChannel(0), scale=stored_scale)
    return QTensor(codes.reshape(rows, columns), QParams(scale.reshape(rows, 1)), spec)


def _given(stored: Mapping[str, Tensor], leaf: str, name: str) -> Tensor:
    if leaf not in stored:
        raise InputError(
            f"the folder lacks {leaf!r} of a quantized weight", where=name, got=", ".join(stored)
        )
    return stored[leaf]


def _packed_fit(
    data: Tensor, scale: Tensor, shift: Tensor, bits: int, shape: tuple[int, ...]
) -> bool:
    """Whether ``data`` packs the codes of a weight of ``shape``, with these scales and shifts."""
    if scale.ndim != data.ndim or scale.shape != shift.shape:
        return False
    codes = (len(scale), *data.shape[1:])
    return (
        len(data) == -(-len(scale) * bits // 8)
        and math.prod(codes) == math.prod(shape)
        and len(scale) % shape[0] == 0
        and all(have in (1, want) for have, want in zip(scale.shape, codes, strict=True))
    )


def _unpack(data: Tensor, bits: int, rows: int) -> Tensor:
    """The codes uint8 ``[rows, ...]`` that ``data`` packs."""
    parts = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts)[:rows]


def _values(stored: Mapping[str, Tensor], kind: str, shape: tuple[int, ...]) -> Tensor:
    """The float values, by the operations of quanto's ``dequantize``."""
    scale = stored["_scale"]
    if kind not in BITS:
        rows = scale.reshape(-1, *[1] * (len(shape) - 1))
        return rows * stored["_data"].to(scale.dtype)
    shift, codes = stored["_shift"], _unpack(stored["_data._data"], BITS[kind], len(scale))
    if shift.is_floating_point():
        return (scale * codes - shift).reshape(shape)
    return (scale * (codes.to(torch.int8) - shift.to(torch.int8))).reshape(shape)


def _table(kind: str) -> Tensor:
    """What each of the 256 bit patterns of an 8-bit float stands for, fp32."""
    return torch.arange(256, dtype=torch.uint8).view(TYPES[kind]).float()


def _book(kind: str) -> Codebook:
    """The finite values of an 8-bit float as a codebook."""
    table = _table(kind)
    return Codebook(kind, tuple(table[torch.isfinite(table)].unique().tolist()))


def _places(data: Tensor, name: str) -> Tensor:
    """The places in :func:`_book` of the 8-bit floats ``data``: uint8, of the same shape."""
    kind = next(kind for kind, dtype in TYPES.items() if dtype == data.dtype)
    table = _table(kind)
    patterns = data.view(torch.uint8).long()
    if bad := int((~torch.isfinite(table[patterns])).sum()):
        raise InputError("the weight is not finite", where=name, got=f"{bad} values")
    places = torch.searchsorted(torch.tensor(_book(kind).entries), table.nan_to_num(0.0, 0.0, 0.0))
    return places.to(torch.uint8)[patterns]
