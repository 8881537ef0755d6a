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
#define QKIT_ABI 3

#define QKIT_API extern "C" __attribute__((visibility("default")))

QKIT_API int32_t qkit_abi();

// Choose the instruction set by name ("scalar", "avx2", "avx512"), or the best one for null.
// Returns the name in use, or null if this processor or this build lacks the one asked for.
QKIT_API const char* qkit_use(const char* isa);

// The pool that runs parallel work: GOMP_parallel of the OpenMP library that the process already
// has (a second pool would fight it for the cores), or null for none.
typedef void (*qkit_pool)(void (*task)(void*), void* data, unsigned threads, unsigned flags);
QKIT_API void qkit_set_pool(qkit_pool pool);

// lo = min(0, least value), hi = max(0, greatest value) of each block; both are NaN where the block
// holds NaN or infinity.
QKIT_API void qkit_range(const float* x, int64_t rows, int64_t columns, int64_t block, float* lo,
                         float* hi, int32_t threads);

// code = clamp(round(x / scale) + zero_point, qmin, qmax); zero_point may be null.
QKIT_API void qkit_quantize(const float* x, int64_t rows, int64_t columns, int64_t block,
                            const float* scale, const int8_t* zero_point, int32_t qmin,
                            int32_t qmax, int8_t* codes, int32_t threads);

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
// with `shared`, there is one row for all.

// x = (code - zero_point) * scale of a stored weight.
QKIT_API void qkit_decode(const uint8_t* weight, int64_t n, int64_t columns, int64_t stride,
                          int32_t bits, int64_t block, const float* scale,
                          const int8_t* zero_point, int32_t shared, float* x, int32_t threads);

// How many floats of scratch memory qkit_linear needs.
QKIT_API int64_t qkit_linear_scratch(int64_t rows, int64_t columns);

// out = x @ W.T + bias with x [rows, columns], out [rows, n], W as in qkit_decode, maybe no bias.
// Summed in fp32, with |error| <= (columns / 4 + 8) * 2^-24 * (sum|x||w| + |bias|). A row of the
// result does not depend on the other rows, nor on the threads; instruction sets differ in order.
QKIT_API void qkit_linear(const float* x, int64_t rows, const uint8_t* weight, int64_t n,
                          int64_t columns, int64_t stride, int32_t bits, int64_t block,
                          const float* scale, const int8_t* zero_point, int32_t shared,
                          const float* bias, float* out, float* scratch, int32_t threads);
