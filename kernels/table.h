// What an instruction set implements: each function does some rows (or bytes), on one thread.
#pragma once
#include <cstdint>

// A stored weight: see qkit.h. A row of scales is `blocks` long; 0 if all rows share one. With
// `levels`, a code stands for levels[code + offset] instead of code - zero_point.
struct Weight {
    const uint8_t* codes;
    int64_t columns, stride, block, blocks;
    int32_t bits;
    const float* scale;
    const int8_t* zero_point;
    const float* levels;
};

// Rows of x that one call of `linear` takes at most, and one of `integer` with several digits; and
// with one, which take less of the cache.
constexpr int64_t ROWS = 64, MOST_ROWS = 128;
// Rows of x up to which the weight is not made a tile, where there is code for that.
constexpr int64_t STREAMED = 4;
// The same where a row's sum is one integer to its end, with so many columns or more.
constexpr int64_t CROSSED = 16, LONG = 4096;
// Columns of x that share a scale where exact activations become integers.
constexpr int64_t BLOCK = 512;

// Columns up to which a sum of products of codes and digits is an int32, with its offsets.
constexpr int64_t WHOLE = 1 << 15;

// Values of x that are quantized at a time, between finding their range and their codes.
constexpr int64_t NEAR = 4096;

// A run of columns that lie in one group of the weight and in one block of x; it begins at a step
// of its own, and its last step may be filled up with zeros.
struct Piece {
    int64_t first, last, step, steps, group;
};

// How integer products go along the columns of a weight; the same for all rows and threads.
struct Plan {
    const Weight* weight;
    const Piece* pieces;         // `count` of them
    const int64_t* first_piece;  // of each block, and of one more
    int64_t count, blocks, steps;
    bool direct;  // the codes are used as they lie in their words, `pack` to a byte; else as bytes
    bool flat;    // one scale for all columns
    bool stream;  // few rows of x: the weight is not made a tile, but multiplied as it lies
    bool whole;   // integer activations and one scale: a row's sum is an integer to its end
    int32_t pack;
};

// What becomes of activations: nothing (exact), or integers in [qmin, qmax], with the scale of
// each row (dynamic, symmetric or affine) or one for all (static).
enum Kind : int32_t { EXACT = 0, SYMMETRIC = 1, AFFINE = 2, STATIC = 3 };

struct Acts {
    Kind kind;
    int32_t qmin, qmax;
    float scale;
    int32_t zero_point;
};

// The activations as integers: see integer.inc.
struct Digits {
    int64_t rows, group;  // `group` rows are met by a tile together
    int64_t stride;       // columns of a streamed row, with what fills it up
    int32_t limbs;        // 1 to 3
    int8_t* codes;        // [groups][steps][rows of the group][limbs][4], or [rows][stride][limbs]
    int32_t* start;       // [rows][pieces][limbs]: minus the offset of the codes times their sum
                          // (streamed: [rows][limbs][pieces])
    float* sum;           // [rows][pieces]: the sum of the row's integers, for zero points
    float* scale;         // [rows][blocks] (streamed: [rows][pieces])
    float* shift;         // [rows]: added to the result, times the last row's; or null
};

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Output {
    void* data;
    Type type;
    int64_t stride;
    const float* bias;
};

// ANS: for each of the 2^bits slots its symbol, that symbol's frequency and the slot's rank in it.
struct AnsTable {
    static constexpr uint32_t max_bits = 15, lower_bound = 1u << 16;  // of a normalised state
    uint32_t step[1u << max_bits];       // frequency | rank << 16
    uint8_t symbol[(1u << max_bits) + 3];  // four bytes are read at a time
};

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
    // Integer products: rows of a tile, digits that meet it at once, and whether they are so fast
    // that exact activations go this way too.
    int64_t tile, meets;
    bool exact, streams;
    void (*widen)(const void* x, Type type, int64_t n, float* out);
    void (*narrow)(const float* x, Type type, int64_t n, void* out);
    bool (*digits)(const Plan& plan, const Acts& acts, const float* x, int64_t row, Digits& out);
    void (*ones)(const Plan& plan, int64_t row, Digits& out);
    void (*integer)(const Plan& plan, const Digits& digits, const Output& out, int64_t first,
                    int64_t last);
    // Decode rounds of 32 ANS states while 32 symbols are wanted and 64 bytes are left; see
    // entropy.cpp. How many symbols that made; null: where gathers do not pay.
    uint64_t (*ans_rounds)(const AnsTable& table, uint32_t bits, uint32_t* x, const uint8_t** p,
                           const uint8_t* end, uint8_t* out, uint64_t count);
};

extern const Table scalar_table;
#if defined(__x86_64__)
extern const Table avx2_table;
extern const Table avx512_table;
extern const Table vnni_table;
#elif defined(__aarch64__)
extern const Table neon_table;
extern const Table dotprod_table;
#endif
