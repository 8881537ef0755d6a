"""Bit packing: the documented stream, bit for bit, and nothing that does not fit."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import pack_oracle, unpack_oracle

from qkit.errors import InputError, UsageError
from qkit.packing import pack, packed_words, unpack

BITS = range(1, 9)
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@st.composite
def codes_to_pack(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
    shape = (*shape[:-1], draw(st.integers(0, 70)))
    elements = st.integers(*limits(bits, signed))
    array = draw(hnp.arrays(np.int8 if signed else np.uint8, shape, elements=elements))
    return torch.from_numpy(array), bits


@given(codes_to_pack())
def test_unpack_inverts_pack(case):
    codes, bits = case
    n, signed = codes.shape[-1], codes.dtype == torch.int8
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], math.ceil(n * bits / 32))
    assert packed.dtype == torch.int32
    back = unpack(packed, bits, n, signed=signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@given(codes_to_pack())
def test_pack_equals_the_oracle_bit_for_bit(case):
    codes, bits = case
    rows = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1]).tolist()
    want = [pack_oracle(row, bits, signed=codes.dtype == torch.int8) for row in rows]
    packed = pack(codes, bits)
    assert packed.reshape(len(rows), packed.shape[-1]).tolist() == want


@SIGNED
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 31, 32, 33, 65])
def test_every_length_round_trips_at_the_limits(n, bits, signed):
    low, high = limits(bits, signed)
    codes = torch.tensor([[low, high] * n, [high, low] * n], dtype=torch.int16)[:, :n]
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert [unpack_oracle(row, bits, n, signed=signed) for row in packed.tolist()] == codes.tolist()
    assert torch.equal(unpack(packed, bits, n, signed=signed), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 3)], ids=str)
def test_empty_tensors_keep_their_shape(shape, bits):
    packed = pack(torch.empty(shape, dtype=torch.int8), bits)
    assert packed.shape == (*shape[:-1], packed_words(shape[-1], bits))
    assert unpack(packed, bits, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 5, 9, 33])
def test_padding_bits_are_zero(n, bits):
    """All ones below, so that a padding bit that leaked from a value would be seen."""
    words = pack(torch.full((1, n), 2**bits - 1, dtype=torch.uint8), bits)
    stream = int.from_bytes(words.numpy().tobytes(), "little")
    assert stream == 2 ** (n * bits) - 1


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("case", ["signed-below", "signed-above", "unsigned-above"])
def test_codes_out_of_range_are_refused(case, bits):
    signed = case.startswith("signed")
    low, high = limits(bits, signed)
    code = low - 1 if case.endswith("below") else high + 1
    codes = torch.tensor([0, code, 0], dtype=torch.int8 if signed else torch.uint8)
    with pytest.raises(UsageError, match=f"do not fit in {bits} bits") as error:
        pack(codes, bits)
    assert error.value.wanted == f"{low}..{high}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("extra", [-1, 1])
def test_wrong_number_of_words_is_refused(extra, bits):
    words = torch.zeros(2, packed_words(40, bits) + extra, dtype=torch.int32)
    with pytest.raises(InputError, match=f"not 40 packed values of {bits} bits"):
        unpack(words, bits, 40)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_words_are_int32(dtype):
    with pytest.raises(InputError, match="wanted: int32"):
        unpack(torch.zeros(2, 5, dtype=dtype), 4, 40)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool], ids=str)
def test_codes_are_bytes(dtype):
    with pytest.raises(UsageError, match="codes are int8 or uint8"):
        pack(torch.zeros(3, dtype=dtype), 4)


@pytest.mark.parametrize("bits", [-1, 0, 9, 32])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="1 to 8 bits"):
        pack(torch.zeros(3, dtype=torch.int8), bits)
    with pytest.raises(UsageError, match="1 to 8 bits"):
        unpack(torch.zeros(3, dtype=torch.int32), bits, 3)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every-other": lambda x: x[:, ::2],
    "columns-from-3": lambda x: x[:, 3:],
    "one-row": lambda x: x[2:3],
    "expanded": lambda x: x[:1].expand(4, -1),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous_tensors(view, bits):
    generator = torch.Generator().manual_seed(0)
    low, high = limits(bits, True)
    codes = torch.randint(low, high + 1, (9, 14), generator=generator).to(torch.int8)
    codes, before = VIEWS[view](codes), VIEWS[view](codes).clone()
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(before.contiguous(), bits))
    assert torch.equal(codes, before), "the input was modified"
    wide = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(wide, bits, codes.shape[-1]), before)
