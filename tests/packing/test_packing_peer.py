"""Our packed words are those of the compressed-tensors library, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from qkit.packing import pack, unpack


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (31, 33), (8, 64), (5, 100)], ids=str)
def test_equal_words(shape, bits, axis):
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    theirs = pack_to_int32(codes, bits, packed_dim=axis)
    ours = pack(codes, bits, axis)
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack_from_int32(ours, bits, codes.shape, packed_dim=axis), codes)
    assert torch.equal(unpack(theirs, bits, shape[axis], axis=axis), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_equal_words_of_stacked_experts(bits):
    codes = torch.randint(-4, 4, (3, 5, 33), dtype=torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis(axis):
    codes = torch.randint(-4, 4, (3, 7, 33), dtype=torch.int8)
    packed = pack(codes, 3, axis)
    assert torch.equal(unpack(packed, 3, codes.shape[axis], axis=axis), codes)
    moved = packed.movedim(axis, -1), codes.movedim(axis, -1)
    assert torch.equal(moved[0], pack(moved[1], 3))
