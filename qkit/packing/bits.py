"""Dense bit packing: integers of 1 to 8 bits as one little-endian bit stream in int32 words.

Along the last axis, value ``i`` of ``b`` bits occupies bits ``i*b .. i*b + b - 1`` of the row's
stream, least significant bit first; word ``w`` holds bits ``32*w .. 32*w + 31``. Values may cross
a word. Each row starts at a word and is filled up with zero bits: ``ceil(n * b / 32)`` words::

    b = 3:   word 0                                          word 1
    bit      0   3   6   9        27  30 | 31 0      3
    value   [v0 ][v1 ][v2 ] ... [v9 ][v10 low | v10 high][v11] ...

Signed codes are stored with an offset, ``code + 2^(b-1)``, so that the stream is unsigned. This
is the ``pack-quantized`` layout of the compressed-tensors format.

On a little-endian host the int32 words and the byte stream are the same memory, and 8 values are
always ``b`` whole bytes: that is how it is computed. Big-endian hosts are refused at import.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from qkit import native
from qkit.errors import InputError, UsageError
from qkit.numerics.tensors import check_out, into
from qkit.spec.granularity import ceil_div

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("qkit packs bits on little-endian machines only")

WORD_BITS = 32


def packed_words(n: int, bits: int) -> int:
    """How many int32 words ``n`` values of ``bits`` bits take."""
    return ceil_div(n * bits, WORD_BITS)


def pack(codes: Tensor, bits: int, axis: int = -1, *, out: Tensor | None = None) -> Tensor:
    """Pack along ``axis``: ``[..., n]`` int8 or uint8 -> ``[..., ceil(n * bits / 32)]`` int32.

    int8 codes lie in [-2^(bits-1), 2^(bits-1) - 1], uint8 codes in [0, 2^bits - 1]; anything else
    raises :class:`~qkit.errors.UsageError`, because a code that does not fit would corrupt its
    neighbours. ``out`` is memory for the result, contiguous (new memory costs more than packing).

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
    tensor([[801]], dtype=torch.int32)
    """
    _check_bits(bits)
    if axis not in (-1, codes.ndim - 1):
        packed = pack(codes.movedim(axis, -1), bits).movedim(-1, axis)
        check_out(out, packed.shape, torch.int32)
        return into(out, packed.contiguous())
    offset = 1 << (bits - 1) if _is_signed(codes) else 0
    n = codes.shape[-1]
    words = packed_words(n, bits)
    shape = (*codes.shape[:-1], words)
    check_out(out, shape, torch.int32)
    if codes.numel() == 0:  # an empty tensor's strides cannot be reinterpreted
        return torch.empty(shape, dtype=torch.int32) if out is None else out
    values = codes.contiguous().view(torch.uint8)
    kernels = native.library() if codes.device.type == "cpu" else None
    if kernels is not None:
        out = torch.empty(shape, dtype=torch.int32) if out is None else out
        rows, threads = out.numel() // words, torch.get_num_threads()
        fit = kernels.qkit_pack(
            values.data_ptr(), rows, n, bits, offset, out.data_ptr(), words * 4, threads
        )
        if not fit:
            raise _misfit(codes, bits, offset)
        return out
    # uint8 arithmetic wraps, so that adding the offset to a signed code's bytes is exact.
    if offset:
        values = values + offset
    if int(values.max()) >> bits:
        raise _misfit(codes, bits, offset)
    values = pad(values, (0, ceil_div(n, 8) * 8 - n))
    octets = values.reshape(*codes.shape[:-1], values.shape[-1] // 8, 8)
    stream = _pack_octets(octets, bits).flatten(-2)
    # A fresh tensor: torch calls a [1, n] slice contiguous although its row stride is not n.
    whole = stream.new_zeros(*codes.shape[:-1], words * 4)
    used = min(words * 4, stream.shape[-1])
    whole[..., :used] = stream[..., :used]
    return into(out, whole.view(torch.int32))


def unpack(
    packed: Tensor,
    bits: int,
    n: int,
    *,
    signed: bool = True,
    axis: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of :func:`pack`: ``[..., words]`` int32 -> ``[..., n]`` int8 (or uint8).

    Raises :class:`~qkit.errors.InputError` if the number of words is not what ``n`` values take.
    """
    _check_bits(bits)
    if axis not in (-1, packed.ndim - 1):
        codes = unpack(packed.movedim(axis, -1), bits, n, signed=signed).movedim(-1, axis)
        check_out(out, codes.shape, codes.dtype)
        return into(out, codes.contiguous())
    if packed.dtype != torch.int32 or packed.shape[-1] != packed_words(n, bits):
        raise InputError(
            f"not {n} packed values of {bits} bits",
            got=f"{packed.dtype} of shape {tuple(packed.shape)}",
            wanted=f"int32 with {packed_words(n, bits)} words in the last dimension",
        )
    shape, dtype = (*packed.shape[:-1], n), torch.int8 if signed else torch.uint8
    check_out(out, shape, dtype)
    if packed.numel() == 0:
        return torch.empty(shape, dtype=dtype) if out is None else out
    if packed.stride(-1) != 1:  # torch calls a [1, 1] slice contiguous although its stride is not
        packed = packed.clone(memory_format=torch.contiguous_format)
    packed = packed.contiguous()
    offset = 1 << (bits - 1) if signed else 0
    kernels = native.library() if packed.device.type == "cpu" else None
    if kernels is not None:
        out = torch.empty(shape, dtype=dtype) if out is None else out
        words, threads = packed.shape[-1], torch.get_num_threads()
        kernels.qkit_unpack(
            packed.data_ptr(), out.numel() // n, n, bits, offset, out.data_ptr(), words * 4, threads
        )
        return out
    stream = packed.view(torch.uint8)
    octets = ceil_div(n, 8)
    # The last word may hold fewer bytes than the last octet needs (or more).
    stream = pad(stream, (0, octets * bits - stream.shape[-1]))
    values = _unpack_octets(stream.reshape(*packed.shape[:-1], octets, bits), bits)
    values = values.flatten(-2).narrow(-1, 0, n)
    return into(out, (values - offset).view(torch.int8) if signed else values.contiguous())


def _misfit(codes: Tensor, bits: int, offset: int) -> UsageError:
    return UsageError(
        f"codes do not fit in {bits} bits",
        got=f"{int(codes.min())}..{int(codes.max())}",
        wanted=f"{-offset}..{(1 << bits) - 1 - offset}",
    )


def _pack_octets(values: Tensor, bits: int) -> Tensor:
    """``[..., 8]`` values -> ``[..., bits]`` bytes, all uint8."""
    out = values.new_zeros(*values.shape[:-1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= values[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= values[..., i] >> (8 - shift)
    return out


def _unpack_octets(stream: Tensor, bits: int) -> Tensor:
    """``[..., bits]`` bytes -> ``[..., 8]`` values, all uint8."""
    out = stream.new_empty(*stream.shape[:-1], 8)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value = value | (stream[..., byte + 1] << (8 - shift))
        out[..., i] = value & mask
    return out


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError("packing takes 1 to 8 bits", got=bits)


def _is_signed(codes: Tensor) -> bool:
    if codes.dtype not in (torch.int8, torch.uint8):
        raise UsageError("codes are int8 or uint8", got=codes.dtype)
    return codes.dtype == torch.int8
