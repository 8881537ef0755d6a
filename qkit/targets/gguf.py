"""GGUF files: quantized layers as the 32-value blocks of ggml, checked by reading them back.

=====  ===========================  =======================================  ==================
type   block of 32 values           a value                                  bytes
=====  ===========================  =======================================  ==================
Q8_0   fp16 ``d``, 32 int8 codes    ``d * code``                             34
Q4_0   fp16 ``d``, 32 codes 0..15   ``d * (code - 8)``; byte ``i`` holds     18
                                    value ``i`` low and ``i + 16`` high
Q4_1   fp16 ``d``, fp16 ``m``, 32   ``d * code + m``; bytes as in Q4_0       20
       codes 0..15
=====  ===========================  =======================================  ==================

The first two are qkit's symmetric formula with groups of 32 and an fp16 scale (:data:`SCHEMES`), so
a conversion moves bits and rounds nothing. Q4_1 is qkit's affine formula, ``d * (code - zero)``, if
``m = -d * zero`` is a number of fp16; it always is where the scale has 7 significant bits, because
a zero point of 0..15 adds 4 and fp16 has 11. Such scales (``fp12-e5m6``) are up to 1/64 greater
than they would have to be. The layouts are those of ggml's ``ggml-common.h``.
The file is a container: its tensors keep the names of the PyTorch model, under the architecture
``qkit``, which llama.cpp does not know and will not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qkit.errors import MissingExtraError, RequestError, VerificationError
from qkit.nn import Entry, QLayer
from qkit.numerics import QTensor
from qkit.spec import FP12_E5M6, FP16, Float, Scheme, parse
from qkit.targets.staging import staged_file

# What to quantize with, so that the layers can be written as blocks of a type.
SCHEMES = {
    "Q8_0": parse("w8a16-g32").with_scale(FP16),
    "Q4_0": parse("w4a16-g32").with_scale(FP16),
    "Q4_1": parse("w4a16-g32-asym").with_scale(FP12_E5M6),
}
BLOCK = 32
MAX_DIMENSIONS = 4
MAGIC = b"GGUF"


def layer_obstacle(entry: Entry, scheme: Scheme) -> str | None:
    """Why no block type holds the layer ``entry``; None where one does."""
    if entry.inside is not None:
        return f"GGUF files keep the tensors of the model: those of a {entry.inside_kind} stay"
    weight: Any = entry.module.weight
    if weight.ndim != 2:
        return "GGUF blocks run along the rows of a matrix"
    if weight.shape[1] % BLOCK:
        return f"its {weight.shape[1]} columns are no multiple of {BLOCK}: GGUF has whole blocks"
    return None


def block_type(layer: QLayer) -> str | None:
    """The block type that holds the codes of ``layer`` exactly; None where there is none."""
    matrix = len(layer.weight_size) == 2 and layer.weight_size[1] % BLOCK == 0
    types = [t for t, s in SCHEMES.items() if s == Scheme(layer.spec, layer.acts)]
    return types[0] if types and matrix else None


def scale_format(scheme: Scheme) -> Float:
    """The format of the scales with which ``scheme`` becomes one of :data:`SCHEMES`."""
    return FP16 if scheme.weight.symmetric else FP12_E5M6


def to_blocks(q: QTensor, *, name: str = "weight") -> np.ndarray:
    """The bytes of ``q`` (``[rows, columns]``) as blocks: uint8 ``[rows, columns / 32 * size]``.

    Raises :class:`~qkit.errors.RequestError` for a minimum that overflows fp16.
    """
    rows, columns = q.shape
    d = q.qparams.scale.reshape(rows, -1, 1).contiguous()
    parts = [d]
    if q.qparams.zero_point is not None:
        minimum = -d * (q.qparams.zero_point.reshape(d.shape) + 8).to(d.dtype)
        if not torch.isfinite(minimum).all():
            raise RequestError(
                "the minimum of a block overflows the fp16 of GGUF", where=name, fix="--format qkit"
            )
        parts.append(minimum)
    codes = q.codes.reshape(rows, columns // BLOCK, BLOCK).numpy()
    if q.spec.format.bits == 4:
        low, high = np.split((codes + 8).astype(np.uint8), 2, axis=-1)
        codes = low | (high << 4)
    head = [part.numpy().view(np.uint8) for part in parts]
    return np.concatenate([*head, codes.view(np.uint8)], axis=-1).reshape(rows, -1)


def write_gguf(model: nn.Module, path: str | Path, *, name: str = "model") -> dict[str, str]:
    """Write ``model`` to the file ``path``; return the type (and why) of each tensor by name.

    Layers quantized with one of :data:`SCHEMES` become blocks. Another quantized layer, or one
    whose rows are no multiple of 32, is written as its exact fp32 values. The file replaces
    ``path`` only after every tensor was read back from it equal, bit by bit.

    Raises :class:`~qkit.errors.MissingExtraError` without the package ``gguf``,
    :class:`~qkit.errors.RequestError` for a tensor that the format has no place for and
    :class:`~qkit.errors.VerificationError` if what is read back differs.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", needed_for="writing a GGUF file") from error
    path = Path(path)
    arrays: dict[str, tuple[np.ndarray, str | None]] = {}
    values: dict[str, np.ndarray] = {}
    told: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own: dict[str, torch.Tensor | None] = dict(module._parameters)
        if isinstance(module, QLayer):
            key, kind = f"{prefix}.weight".lstrip("."), block_type(module)
            q = module.qtensor()
            values[key] = module.values(torch.float32).cpu().numpy()
            if kind is None:
                told[key] = f"F32: {module.spec.describe()} of this shape has no exact block type"
            else:
                told[key] = kind
            arrays[key] = (values[key] if kind is None else to_blocks(q, name=key), kind)
        else:
            own |= module._buffers
        for attribute, tensor in own.items():
            if tensor is not None:
                key = f"{prefix}.{attribute}".lstrip(".")
                array = _plain(tensor)
                values[key], arrays[key], told[key] = array, (array, None), str(array.dtype)
    for key, array in values.items():
        if array.ndim > MAX_DIMENSIONS or not array.size:
            raise RequestError(
                f"GGUF holds tensors of 1 to {MAX_DIMENSIONS} dimensions that are not empty",
                where=key,
                got=array.shape,
            )
    with staged_file(path) as part:
        writer: Any = gguf.GGUFWriter(part, "qkit")
        writer.add_name(name)
        for key, (array, kind) in arrays.items():
            raw = None if kind is None else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(key, array, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(gguf, part, values)
    return told


def _plain(tensor: torch.Tensor) -> np.ndarray:
    """``tensor`` in a dtype that GGUF has: bf16 as fp32 (exact), bool and uint8 as integers."""
    tensor = tensor.detach().cpu()
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    wider = {torch.bfloat16: torch.float32, torch.bool: torch.int8, torch.uint8: torch.int16}
    return tensor.to(wider.get(tensor.dtype, tensor.dtype)).contiguous().numpy()


def _read_back(gguf: Any, path: Path, values: dict[str, np.ndarray]) -> None:
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for key, want in values.items():
        tensor = read.get(key)
        have = None
        if tensor is not None:
            blocks = tensor.tensor_type.name in SCHEMES
            have = gguf.dequantize(tensor.data, tensor.tensor_type) if blocks else tensor.data
        if have is None or not np.array_equal(have.reshape(want.shape), want, equal_nan=True):
            raise VerificationError("the GGUF file does not read back as written", where=key)
