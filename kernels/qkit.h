// The C interface of qkit's kernels: plain pointers and sizes, no torch and no Python.
//
// A matrix is [rows, columns], row-major and contiguous. `block` neighbours of a row share a scale
// (the last block of a row may be short), so a parameter is [rows, blocks] with
// blocks = ceil(columns / block). Pointers need no alignment. Inputs and outputs do not overlap.
// `threads` is how many threads may work; functions are safe to call from several threads. Where
// Linux offers large pages on request, they are requested for results of several MiB.
// Rounding is half to even, divisions are IEEE fp32: every instruction set gives the same bits.
#pragma once
#include <cstdint>

// Raised whenever a signature or a layout changes; qkit/native.py holds the same number.
#define QKIT_ABI 6

#define QKIT_API extern "C" __attribute__((visibility("default")))

QKIT_API int32_t qkit_abi();

// Choose the instruction set by name ("scalar", "avx2", "avx512", "avx512vnni", "neon", "dotprod"),
// or the best one for null. Returns the name in use, or null if this processor or this build lacks
// the one asked for.
QKIT_API const char* qkit_use(const char* isa);

// The pool that runs parallel work: GOMP_parallel of the OpenMP library that the process already
// has (a second pool would fight it for the cores), or null for none.
typedef void (*qkit_pool)(void (*task)(void*), void* data, unsigned threads, unsigned flags);
QKIT_API void qkit_set_pool(qkit_pool pool);

// Memory that will be read often, such as a weight: where Linux makes large pages of small ones on
// request, the whole ones inside become large (2 MiB), so that reading it seldom waits for a page's
// address. What it holds stays as it is; this takes about as long as copying it.
QKIT_API void qkit_keep(const void* memory, int64_t bytes);

// lo = min(0, least value), hi = max(0, greatest value) of each block; both are NaN where the block
// holds NaN or infinity.
QKIT_API void qkit_range(const float* x, int64_t rows, int64_t columns, int64_t block, float* lo,
                         float* hi, int32_t threads);

// code = clamp(round(x / scale) + zero_point, qmin, qmax); zero_point may be null.
QKIT_API void qkit_quantize(const float* x, int64_t rows, int64_t columns, int64_t block,
                            const float* scale, const int8_t* zero_point, int32_t qmin,
                            int32_t qmax, int8_t* codes, int32_t threads);

// The two above and the scales between them in one pass over x: of each block the range, its scale
// and (if zero_point is not null: affine) zero point, and the codes, as qkit.numerics.affine chooses
// them for fp32 scales. A symmetric range is narrow if qmin = -qmax, else full. Returns 1, or 0 if x
// is not finite or some range overflows: then the results mean nothing.
QKIT_API int32_t qkit_quantize_minmax(const float* x, int64_t rows, int64_t columns, int64_t block,
                                      int32_t qmin, int32_t qmax, float* scale, int8_t* zero_point,
                                      int8_t* codes, int32_t threads);

// x = (code - zero_point) * scale; zero_point may be null.
QKIT_API void qkit_dequantize(const int8_t* codes, int64_t rows, int64_t columns, int64_t block,
                              const float* scale, const int8_t* zero_point, float* x,
                              int32_t threads);

// Each row of codes, plus `offset`, as a little-endian stream of `bits` (1..8) bits, filled up with
// zero bits to `stride` bytes (at least ceil(columns * bits / 8)). Returns 1, or 0 if some code does
// not fit in its bits: then the streams mean nothing.
QKIT_API int32_t qkit_pack(const uint8_t* codes, int64_t rows, int64_t columns, int32_t bits,
                           int32_t offset, uint8_t* stream, int64_t stride, int32_t threads);

// The inverse of qkit_pack.
QKIT_API void qkit_unpack(const uint8_t* stream, int64_t rows, int64_t columns, int32_t bits,
                          int32_t offset, uint8_t* codes, int64_t stride, int32_t threads);

// A stored weight is [n, columns] codes, each row a stream of `bits` (1..8) bits, with the offset
// 2^(bits-1) below 8 bits, as qkit_pack writes it; rows are `stride` bytes apart. A row of `scale`
// (and of `zero_point`, which may be null) has ceil(columns / block) entries, one for `block` 0;
// with `shared`, there is one row for all. Its values are (code - zero_point) * scale, or, if
// `levels` is not null, levels[code] * scale with codes from 0 to 2^bits - 1 and no offset.
// `bias` [n] may be null.
struct qkit_weight {
    const uint8_t* codes;
    int64_t n, columns, stride, block;
    int32_t bits, shared;
    const float* scale;
    const int8_t* zero_point;
    const float* levels;
    const float* bias;
};

// What a linear layer does to its activations before it multiplies: `kind` 0 nothing; 1 and 2
// integers in [qmin, qmax], with a scale (2: and a zero point) for each row from its range, found
// as qkit.numerics.affine does; 3 integers with the `scale` and `zero_point` given here.
struct qkit_acts {
    int32_t kind, qmin, qmax;
    float scale;
    int32_t zero_point;
};

// Types of x and out: 0 fp32, 1 bf16, 2 fp16.

// The values of `count` rows of a stored weight, those of `index` or the first ones, in `out`
// [count, columns].
QKIT_API int32_t qkit_decode(const qkit_weight* weight, const int64_t* index, int64_t count,
                             int32_t dtype, void* out, int32_t threads);

// out [rows, n] = x [rows, columns] @ W.T + bias; 1 if there is no memory, else 0.
//
// A row of the result does not depend on the other rows, nor on the threads. With u = 2^-24, before
// the result is rounded to the type of out, and where nothing overflows:
//
// * Exact activations, by floats: |error| <= (columns / 4 + 8) u (sum|x||w| + |bias|).
// * Exact activations, by integers (where these are fast; not with levels): x becomes x', 23 bits
//   below the greatest of its 512 columns, |x' - x| <= max(2^-22.9 max|x| of the block, 2^-127)
//   (bf16, which has 8 bits itself: 15, with 2^-14.9 and 2^-119, so that what is more than 1/128 of
//   the greatest stays exact), and is summed with
//   |error| <= (pieces + 4) u (sum|x'|(|code| + |zero_point|)|scale| + |bias|), where a piece is
//   what a group and a block of 512 columns have in common. Rows that are not finite, or hold a
//   magnitude of 2^110 or more, go by floats.
// * Integer activations x' = q * a, with a zero point z: sum x' w - (z a) sum w, both sums as above
//   (but with one scale for a row of at most 2^15 columns, the row is one piece),
//   |error| <= (pieces + 7) u (sum(|x'| + |z a|)(|code| + |zero_point|)|scale| + |bias|); without
//   z, (pieces + 4) u. Rows that are not finite give NaN.
//
// A product below 2^-126 adds up to 2^-150 to the error: there are `columns` of them by floats, and
// 2 pieces + 4 by integers. By integers, a row overflows if sum(|x'| + |z a|)(|code| +
// |zero_point|), with |scale| or without, reaches 2^127.
//
// The integer ways give the same bits on every instruction set.
QKIT_API int32_t qkit_linear(const qkit_weight* weight, const qkit_acts* acts, const void* x,
                             int32_t dtype, int64_t rows, void* out, int32_t threads);
