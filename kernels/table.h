// What an instruction set implements: each function does some rows (or bytes), on one thread.
#pragma once
#include <cstdint>

// A stored weight: see qkit_linear. A row of scales is `blocks` long; 0 if all rows share one.
struct Weight {
    const uint8_t* codes;
    int64_t columns, stride, block, blocks;
    int32_t bits;
    const float* scale;
    const int8_t* zero_point;
};

// Rows of x that one call of `linear` takes at most.
constexpr int64_t ROWS = 64;

struct Table {
    const char* name;
    int64_t lanes, strip;  // of a linear layer: columns of x, rows of the weight done together
    void (*range)(const float* x, int64_t n, int64_t block, float* lo, float* hi);
    void (*quantize)(const float* x, int64_t n, int64_t block, const float* scale,
                     const int8_t* zero_point, int32_t qmin, int32_t qmax, int8_t* codes);
    void (*dequantize)(const int8_t* codes, int64_t n, int64_t block, const float* scale,
                       const int8_t* zero_point, float* x);
    bool (*pack)(const uint8_t* codes, int64_t n, int32_t bits, int32_t offset, uint8_t* stream,
                 int64_t stride);
    void (*unpack)(const uint8_t* stream, int64_t n, int32_t bits, int32_t offset, uint8_t* codes);
    void (*decode)(const Weight& weight, int64_t row, int64_t first, int64_t last, float* out);
    void (*arrange)(const float* x, int64_t rows, int64_t columns, float* out);
    void (*linear)(const float* x, int64_t rows, const Weight& weight, const float* bias,
                   float* out, int64_t stride, int64_t first, int64_t last);
};

extern const Table scalar_table;
#if defined(__x86_64__)
extern const Table avx2_table;
extern const Table avx512_table;
#endif
