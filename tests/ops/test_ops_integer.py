"""Layers with integer activations or codebooks, and embeddings: reference, kernels, oracle.

Integer activations x' = q a, with a zero point z. The codes q are exact (the oracle's), and so are
products of codes. The tolerance of the kernels is that of kernels/qkit.h: with u = 2^-24, and a
piece for what a group and a block of 512 columns have in common (one, if there are no groups and at
most 2^15 columns),

    |error| <= (pieces + 7) u (sum (|q| + |z|) a (|code| + |zero|) |scale| + |bias|)

and pieces + 4 without z, and for each of 2 pieces + 4 products below 2^-126 up to 2^-150 more.
The reference sums K products of rounded factors in any order, with u = 2^-53 for fp64:

    |error| <= (K + 4) u (sum a |q - z| |w| + |bias|)

Narrower results are rounded once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from machine import ISAS
from numpy.typing import NDArray
from oracle import act_oracle, codebook_oracle, dequantize_oracle, linear_oracle

from qkit import native, ops
from qkit.algorithms import rtn
from qkit.numerics import QTensor
from qkit.ops import native as kernels
from qkit.ops import reference
from qkit.packing import to_tensors
from qkit.packing.store import levels_of
from qkit.spec import BF16, FP16, Codebook, PerChannel, PerGroup, PerTensor, QSpec, parse

LIBRARY = native.library()
WAYS = [*(ISAS if LIBRARY is not None else ()), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCK, WHOLE = 512, 1 << 15

SCHEMES = [
    *("w8a16", "w8a16-asym", "w8a16-g32", "w8a16-g5-asym", "w8a16-tensor-asym"),
    *("w4a16-channel", "w4a16-g32", "w4a16-g32-asym", "w4a16-g64-asym", "w4a16-tensor"),
    *(f"w{bits}a16-{form}" for bits in (1, 2, 3, 5, 6, 7) for form in ("channel-asym", "g12-asym")),
]
FEW = ["w8a16", "w8a16-g5-asym", "w4a16-g32", "w3a16-g8-asym", "w4a16-tensor"]
# One more and one less than a vector, a word, a block of 512.
COLUMNS = [1, 3, 4, 7, 16, 31, 33, 63, 65, 130, 511, 512, 513]
# (bits, symmetric, static scale and zero point)
DYNAMIC = [(8, True, None), (8, False, None), (4, True, None), (2, False, None), (5, False, None)]
STATIC = [(8, True, (0.02, 0)), (8, False, (0.017, -31)), (4, False, (0.3, 7)), (3, True, (0.9, 0))]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the kernels, and the reference."""
    if request.param == "reference":
        yield request.param
        return
    assert LIBRARY is not None
    before = native.isa()
    if LIBRARY.qkit_use(request.param.encode()) is None:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    LIBRARY.qkit_use(before.encode() if before else None)


def run(way: str, name: str, *args) -> torch.Tensor:
    """The operator ``name`` in one way; fp64 is the reference's."""
    if way == "reference":
        return reference.IMPLEMENTATIONS[name](*args)
    got = kernels.IMPLEMENTATIONS[name](*args)
    wide = any(torch.float64 in (a, getattr(a, "dtype", None)) for a in args)
    assert (got is None) == wide, "the kernels take everything but fp64"
    return reference.IMPLEMENTATIONS[name](*args) if got is None else got


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A stored weight, and what it stands for: W [n, k], and (|code| + |zero|) |scale|."""

    args: tuple  # weight, scale, zero point (or levels)
    how: tuple[int, int]  # bits, group
    exact: NDArray
    size: NDArray


def group_of(spec: QSpec) -> int:
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0


def stored(scheme: str | QSpec, rows: int, columns: int, scale=None, matrix=None) -> Case:
    spec = parse(scheme).weight if isinstance(scheme, str) else scheme
    spec = spec if scale is None else replace(spec, scale=scale)
    matrix = randn(rows, columns, seed=1) if matrix is None else matrix
    q = rtn(matrix, spec)
    tensors = to_tensors(q, (rows, columns))
    weight = tensors["weight" if spec.format.bits == 8 else "weight_packed"]
    third = levels_of(spec.format) if spec.by_table else tensors.get("weight_zero_point")
    exact, size = values_of(q)
    how = spec.format.bits, group_of(spec)
    return Case((weight, q.qparams.scale, third), how, exact, size)


def values_of(q: QTensor) -> tuple[NDArray, NDArray]:
    codes, scale = q.codes.numpy().astype(int), q.qparams.scale.double().numpy()
    block = q.spec.granularity.block_shape(q.shape)
    if q.spec.by_table:
        exact = codebook_oracle(codes, scale, levels_of(q.spec.format).tolist(), block)
        return exact, np.abs(exact)
    zero = None if q.qparams.zero_point is None else q.qparams.zero_point.numpy().astype(int)
    minus = None if zero is None else -np.abs(zero)
    exact = dequantize_oracle(codes, scale, zero, block)
    return exact, dequantize_oracle(np.abs(codes), np.abs(scale), minus, block)


def call(way: str, x: torch.Tensor, case: Case, bias, acts) -> torch.Tensor:
    bits, symmetric, static = acts
    rest = (*case.args, bias, *case.how, bits)
    if static is None:
        return run(way, "linear_dynamic", x, *rest, symmetric)
    scale, zero = torch.tensor([static[0]]), torch.tensor([static[1]], dtype=torch.int8)
    return run(way, "linear_static", x, *rest, scale, None if symmetric else zero)


def check(way: str, x: torch.Tensor, case: Case, bias, acts) -> torch.Tensor:
    """The result of one way is that of the oracle, within the bounds at the top of this file."""
    got = call(way, x, case, bias, acts)
    columns = x.shape[-1]
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], len(case.exact)))
    wide = x if x.dtype == torch.float64 else x.float()
    rounded, most = act_oracle(wide.reshape(-1, columns).numpy(), *acts)
    added = None if bias is None else bias.double().numpy()
    want, size = linear_oracle(rounded, case.exact, added)
    if way == "reference" or x.dtype == torch.float64:
        unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
        inside = 1.01 * (columns + 4) * unit * size
    else:
        group = case.how[1] or columns
        pieces = len({*range(0, columns, BLOCK), *range(0, columns, group)})
        if group >= columns and columns <= WHOLE:
            pieces = 1
        _, size = linear_oracle(most, case.size, added)
        inside = 1.01 * (pieces + (4 if acts[1] else 7)) * 2.0**-24 * size
        inside = inside + (2 * pieces + 4) * 2.0**-150
    info = torch.finfo(x.dtype)
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    outside = info.eps / 2 * (np.abs(want) + inside) + info.tiny if narrow else 0
    error = np.abs(got.double().numpy().reshape(want.shape) - want)
    assert (error <= inside + outside).all(), f"{np.max(error / (inside + outside)):.2f} x bound"
    return got


# ---------------------------------------------------------------- integer activations


@pytest.mark.parametrize("acts", [*DYNAMIC, *STATIC], ids=str)
@pytest.mark.parametrize("scheme", FEW)
def test_every_kind_of_activations(scheme, acts, way):
    case, bias = stored(scheme, 7, 45), randn(7, seed=2)
    check(way, randn(3, 45), case, bias, acts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight(scheme, way):
    case = stored(scheme, 5, 70)
    for acts in (DYNAMIC[0], DYNAMIC[1], STATIC[1]):
        check(way, randn(2, 70), case, None, acts)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 33, 513])
def test_the_full_symmetric_range(columns, bits, way):
    """Activations from -2^(b-1) on, with the scale max|x| / (2^(b-1) - 1/2)."""
    case, x = stored("w4a16-g8", 5, columns), randn(7, columns)
    got = run(way, "linear_dynamic", x, *case.args, None, *case.how, bits, True, True)
    least, rows = -(2 ** (bits - 1)), x.double().numpy()
    scale = np.abs(rows).max(1, keepdims=True) / (-least - 0.5)
    scale = scale.astype(np.float32)  # to nearest
    codes = np.clip(np.rint(x.numpy() / scale), least, -least - 1)
    assert codes.min() == least
    rounded = codes * scale.astype(np.float64)
    want, size = linear_oracle(rounded, case.exact, None)
    assert (np.abs(got.double().numpy() - want) <= (columns + 8) * 2.0**-24 * size).all()
    torch.library.opcheck(ops.linear_dynamic, (x, *case.args, None, *case.how, bits, True, True))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scheme", ["w8a16-g5-asym", "w8a16", "w4a16-g32", "w3a16-g8-asym"])
def test_every_number_of_columns(scheme, columns, way):
    for rows, acts in ((1, DYNAMIC[0]), (2, DYNAMIC[1])):
        check(way, randn(rows, columns), stored(scheme, 3, columns), randn(3, seed=2), acts)


@pytest.mark.parametrize("outputs", [1, 2, 15, 16, 17, 33, 65])
@pytest.mark.parametrize("rows", [1, 2, 7, 65])
def test_every_number_of_rows_and_outputs(rows, outputs, way):
    case = stored("w4a16-g8", outputs, 20)
    for acts in (DYNAMIC[0], STATIC[1]):
        check(way, randn(rows, 20), case, randn(outputs, seed=2), acts)


@dtypes
@pytest.mark.parametrize("scale", [None, FP16, BF16], ids=str)
@pytest.mark.parametrize("acts", [DYNAMIC[0], DYNAMIC[1], STATIC[1]], ids=str)
def test_dtypes_of_inputs_and_scales(acts, scale, dtype, way):
    case = stored("w4a16-g8", 5, 21, scale)
    for lead in ((), (2,), (2, 0), (2, 1, 2)):
        bias = randn(5, seed=2).to(dtype)
        if math.prod(lead):
            check(way, randn(*lead, 21).to(dtype), case, bias, acts)
        else:
            got = call(way, randn(*lead, 21).to(dtype), case, bias, acts)
            assert (got.dtype, got.shape) == (dtype, (*lead, 5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("acts", [DYNAMIC[0], DYNAMIC[1], STATIC[0], STATIC[1]], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_alone(acts, bad, way):
    case, x = stored("w4a16-g8", 5, 21), randn(4, 21)
    want = call(way, x, case, None, acts)
    x[1, 20] = x[3, 0] = bad
    got = call(way, x, case, None, acts)
    assert got[[1, 3]].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("acts", [DYNAMIC[0], DYNAMIC[1]], ids=str)
@pytest.mark.parametrize("x", [0.0, 3.0, -3.0, 1e-42, 1e30], ids=str)
def test_rows_of_one_value(x, acts, way):
    """All zero, one-sided, denormal and great rows have a stated answer."""
    check(way, torch.full((1, 9), x), stored("w8a16", 3, 9), randn(3, seed=2), acts)


def same_bits(case: Case, columns: int, many: tuple[int, ...], acts) -> None:
    assert LIBRARY is not None
    before, results = native.isa(), {}
    try:
        for isa in ISAS:
            if LIBRARY.qkit_use(isa.encode()) is not None:
                for rows in many:
                    x = randn(rows, columns)
                    results.setdefault(rows, []).append(call(isa, x, case, None, acts))
    finally:
        LIBRARY.qkit_use(before.encode() if before else None)
    for same in results.values():
        assert all(torch.equal(got, same[0]) for got in same)


with_kernels = pytest.mark.skipif(LIBRARY is None, reason=f"no kernels: {native.status()}")


@with_kernels
@pytest.mark.parametrize("acts", [*DYNAMIC, *STATIC], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_instruction_sets_give_the_same_bits(scheme, acts):
    same_bits(stored(scheme, 37, 530), 530, (1, 4), acts)


@with_kernels
@pytest.mark.parametrize("acts", [DYNAMIC[0], DYNAMIC[1], STATIC[1]], ids=str)
@pytest.mark.parametrize(
    "scheme", ["w8a16", "w8a16-asym", "w4a16-channel", "w3a16-channel-asym", "w2a16-channel-asym"]
)
def test_whole_rows_give_the_same_bits(scheme, acts):
    """Rows that are longer than what is kept in the first cache, more of them than are streamed."""
    same_bits(stored(scheme, 43, 4700), 4700, (1, 3, 6, 70), acts)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("columns", [32768, 32769])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-asym", "w4a16-channel"])
def test_the_longest_sum_that_is_one_integer(scheme, columns, sign, way):
    """The greatest codes everywhere, at the columns up to which their sum is kept in 32 bits."""
    case = stored(scheme, 2, columns, matrix=torch.full((2, columns), float(sign)))
    for acts in (DYNAMIC[0], DYNAMIC[1]):
        check(way, torch.full((5, columns), 3.0), case, None, acts)
        check(way, torch.full((1, columns), -3.0), case, None, acts)


def test_a_row_depends_neither_on_the_others_nor_on_the_threads(way):
    if way == "reference":
        return  # torch's product may
    case, x, threads = stored("w4a16-g32", 101, 530), randn(70, 530), torch.get_num_threads()
    for acts in (DYNAMIC[0], DYNAMIC[1], STATIC[1]):
        want = call(way, x, case, None, acts)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert torch.equal(call(way, x, case, None, acts), want)
        finally:
            torch.set_num_threads(threads)
        for part in (slice(0, 1), slice(3, 5), slice(60, 70)):
            assert torch.equal(call(way, x[part], case, None, acts), want[part])


# ---------------------------------------------------------------- codebooks


def book(entries: int, granularity=None) -> QSpec:
    """Entries that are neither even nor centred."""
    steps = np.random.default_rng(entries).uniform(0.1, 1, entries).cumsum()
    values = (2 * steps / steps[-1] - 0.9).tolist()
    return QSpec(Codebook("odd", tuple(values)), granularity or PerChannel(0))


BOOKS = {
    "nf4-g8": parse("nf4-g8").weight,
    "nf4-channel": parse("nf4-channel").weight,
    "nf4-g64": parse("nf4-g64").weight,
    **{f"book{n}": book(n) for n in (2, 3, 4, 8, 11, 16, 17, 64, 128, 129, 256)},
    "book5-g8": book(5, PerGroup(8)),
    "book200-g8": book(200, PerGroup(8)),
    "book16-tensor": book(16, PerTensor()),
    **{name: parse(name).weight for name in ("fp8", "fp8-e5m2-g8", "mxfp4", "mxfp8")},
}
books = pytest.mark.parametrize("spec", BOOKS.values(), ids=BOOKS)


@books
def test_codebooks(spec, way):
    for rows, columns in ((1, 33), (3, 33), (2, 1), (5, 70)):
        check_codebook(way, randn(rows, columns), stored(spec, 7, columns), randn(7, seed=2))


def check_codebook(way: str, x: torch.Tensor, case: Case, bias) -> None:
    """A value levels[code] * scale is rounded once, then as test_ops_reference.py says."""
    got, columns = run(way, "linear_codebook", x, *case.args, bias, *case.how), x.shape[-1]
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], len(case.exact)))
    wide = x.double().reshape(-1, columns).numpy()
    want, size = linear_oracle(wide, case.exact, None if bias is None else bias.double().numpy())
    inside = 1.01 * (columns + 4) * (2.0**-53 if x.dtype == torch.float64 else 2.0**-24) * size
    info = torch.finfo(x.dtype)
    outside = info.eps / 2 * (np.abs(want) + inside) + info.tiny
    assert (np.abs(got.double().numpy().reshape(want.shape) - want) <= inside + outside).all()


@dtypes
def test_codebooks_take_every_input(dtype, way):
    case = stored(BOOKS["nf4-g8"], 5, 21)
    for lead in ((), (2,), (2, 1, 2)):
        check_codebook(way, randn(*lead, 21).to(dtype), case, randn(5, seed=2).to(dtype))


@books
@dtypes
def test_dequantized_codebooks(dtype, spec, way):
    """Level times scale, rounded to fp32 (exact in fp64), and then to the result's dtype."""
    case = stored(spec, 7, 33)
    got = run(way, "dequantize_codebook", *case.args, *case.how, 33, dtype)
    exact = torch.from_numpy(case.exact)
    want = exact if dtype == torch.float64 else exact.float().to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


# ---------------------------------------------------------------- embedding


@dtypes
@pytest.mark.parametrize("scheme", [*FEW, "w1a16-g5-asym", "w6a16"])
def test_embedding_is_rows_of_the_matrix(scheme, dtype, way):
    case = stored(scheme, 11, 33)
    want = reference.dequantize(*case.args, *case.how, 33, dtype)
    if dtype == torch.float64:  # 9 bits times 24 are exact
        np.testing.assert_array_equal(want.numpy(), case.exact)
    for shape in ((), (1,), (0,), (3, 2), (2, 0, 2)):
        for kind in (torch.int64, torch.int32):
            at = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(3)).to(kind)
            got = run(way, "embedding", at, *case.args, *case.how, 33, dtype)
            assert (got.dtype, got.shape) == (dtype, (*shape, 33))
            assert torch.equal(got, want[at.long()])


@pytest.mark.parametrize("bad", [-1, 11, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym", "w4a16-tensor"])
def test_an_index_out_of_range(scheme, bad):
    case = stored(scheme, 11, 33)
    with pytest.raises(IndexError, match="11 rows"):
        ops.embedding(torch.tensor([[0, bad]]), *case.args, *case.how, 33, torch.float32)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int8], ids=str)
def test_indices_are_int32_or_int64(kind):
    case = stored("w8a16", 11, 33)
    with pytest.raises(RuntimeError, match="indices"):
        ops.embedding(torch.ones(2, dtype=kind), *case.args, *case.how, 33, torch.float32)


# ---------------------------------------------------------------- what is refused


ONE, TWO = torch.ones(1), torch.ones(2)
# name: (message, operator, what follows x, the weight, its bias and its bits and group)
REFUSED: dict[str, tuple[str, str, tuple]] = {
    "act bits 1": ("2 to 8 bits", "linear_dynamic", (1, True)),
    "act bits 9": ("2 to 8 bits", "linear_dynamic", (9, True)),
    "static bits": ("2 to 8 bits", "linear_static", (1, ONE, None)),
    "two scales": ("one number", "linear_static", (8, TWO, None)),
    "two zero points": ("one number", "linear_static", (8, ONE, TWO.to(torch.int8))),
}


@pytest.mark.parametrize(("message", "name", "acts"), REFUSED.values(), ids=REFUSED)
def test_activations_that_are_refused(message, name, acts):
    case = stored("w4a16-g32", 5, 70)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(randn(2, 70), *case.args, None, *case.how, *acts)


def test_inputs_that_are_refused():
    case, x = stored("w4a16-g32", 5, 70), randn(2, 70)
    for wrong, message in ((x[:, :8], "features"), (x.int(), "float")):
        for name, acts in (("linear_dynamic", (8, True)), ("linear_static", (8, ONE, None))):
            with pytest.raises(RuntimeError, match=message):
                getattr(ops, name)(wrong, *case.args, None, *case.how, *acts)


def test_a_codebook_has_a_level_for_each_code():
    case, short = stored(BOOKS["nf4-g8"], 5, 70), torch.ones(15)
    with pytest.raises(RuntimeError, match="16 levels"):
        ops.linear_codebook(randn(2, 70), *case.args[:2], short, None, *case.how)
    with pytest.raises(RuntimeError, match="16 levels"):
        ops.dequantize_codebook(*case.args[:2], short, *case.how, 70, torch.float32)


def test_layers_without_inputs_or_outputs():
    """nn.Linear(0, n) and nn.Linear(n, 0) exist."""
    zero = torch.empty(4, 0, dtype=torch.int8), torch.empty(4, 0), None
    none = torch.empty(0, 5, dtype=torch.int8), torch.empty(0, 1), None
    for symmetric in (True, False):
        y = ops.linear_dynamic(torch.ones(2, 0), *zero, torch.ones(4), 8, 0, 8, symmetric)
        assert torch.equal(y, torch.ones(2, 4))
        y = ops.linear_dynamic(torch.ones(2, 5), *none, None, 8, 0, 8, symmetric)
        assert y.shape == (2, 0)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("acts", [*DYNAMIC, *STATIC], ids=str)
def test_gradients_pass_straight_through_but_where_a_static_range_clips(acts):
    case = stored("w4a16-g8-asym", 5, 21)
    x, bias = (3 * randn(2, 3, 21)).requires_grad_(), randn(5, seed=2).requires_grad_()
    bits, symmetric, static = acts
    rest = (*case.args, bias, *case.how, bits)
    if static is None:
        y = ops.linear_dynamic(x, *rest, symmetric)
        inside = torch.ones_like(x, dtype=torch.bool)
    else:
        zero = None if symmetric else torch.tensor([static[1]], dtype=torch.int8)
        y = ops.linear_static(x, *rest, torch.tensor([static[0]]), zero)
        least = -(2 ** (bits - 1)) + symmetric
        codes = (x.detach() / static[0]).round() + static[1]
        inside = (codes >= least) & (codes <= 2 ** (bits - 1) - 1)
        assert 0 < inside.sum() < inside.numel(), "the case clips some, not all"
    given = randn(2, 3, 5, seed=4)
    got_x, got_bias = torch.autograd.grad(y, (x, bias), given)
    want = given @ torch.from_numpy(case.exact).float() * inside
    torch.testing.assert_close(got_x, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_bias, given.sum((0, 1)))


def test_gradients_of_a_codebook():
    case = stored(BOOKS["nf4-g8"], 5, 21)
    x, bias = randn(2, 3, 21).requires_grad_(), randn(5, seed=2).requires_grad_()
    given = randn(2, 3, 5, seed=4)
    y = ops.linear_codebook(x, *case.args, bias, *case.how)
    got_x, got_bias = torch.autograd.grad(y, (x, bias), given)
    want = given @ torch.from_numpy(case.exact).float()
    torch.testing.assert_close(got_x, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_bias, given.sum((0, 1)))


# ---------------------------------------------------------------- citizens of torch


@pytest.mark.parametrize("acts", [*DYNAMIC[:2], *STATIC[:2]], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym"])
def test_opcheck_of_integer_activations(scheme, acts):
    case, (bits, symmetric, static) = stored(scheme, 5, 9), acts
    x, bias = torch.randn(3, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    rest = (x, *case.args, bias, *case.how, bits)
    if static is None:
        torch.library.opcheck(ops.linear_dynamic, (*rest, symmetric))
        return
    zero = None if symmetric else torch.tensor([static[1]], dtype=torch.int8)
    torch.library.opcheck(ops.linear_static, (*rest, torch.tensor([static[0]]), zero))


@pytest.mark.parametrize("name", ["nf4-g8", "book129", "book16-tensor"])
def test_opcheck_of_codebooks(name):
    case = stored(BOOKS[name], 5, 9)
    x, bias = torch.randn(3, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(ops.linear_codebook, (x, *case.args, bias, *case.how))
    torch.library.opcheck(ops.dequantize_codebook, (*case.args, *case.how, 9, torch.float16))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym", "w4a16-tensor"])
def test_opcheck_of_embedding(scheme):
    case = stored(scheme, 5, 9)
    at = torch.tensor([[0, 4, 2]])
    torch.library.opcheck(ops.embedding, (at, *case.args, *case.how, 9, torch.float32))


def test_what_ran_is_counted():
    case, coded = stored("w4a16-g8", 5, 9), stored(BOOKS["nf4-g8"], 5, 9)
    x, isa = randn(2, 9), native.isa() or "reference"
    with ops.count_calls() as calls:
        for given in (x, x.double()):
            ops.linear_dynamic(given, *case.args, None, *case.how, 8, True)
            ops.linear_static(given, *case.args, None, *case.how, 8, torch.ones(1), None)
            ops.linear_codebook(given, *coded.args, None, *coded.how)
        for dtype in (torch.float32, torch.float64):
            ops.dequantize_codebook(*coded.args, *coded.how, 9, dtype)
            ops.embedding(torch.tensor([1]), *case.args, *case.how, 9, dtype)
    names = "linear_dynamic", "linear_static", "linear_codebook", "dequantize_codebook", "embedding"
    want: dict[str, int] = {}
    for name, ran in itertools.product(names, (isa, "reference")):
        want[f"qkit::{name}[{ran}]"] = want.get(f"qkit::{name}[{ran}]", 0) + 1
    assert calls == want
