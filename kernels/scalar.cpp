// Portable C++: complete, and the definition of correct.
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "table.h"

namespace {

uint64_t pack8(uint64_t eight, int bits) {
    uint64_t out = 0, mask = (1u << bits) - 1;
    for (int i = 0; i < 8; ++i) out |= (eight >> (8 * i) & mask) << (bits * i);
    return out;
}

uint64_t unpack8(uint64_t packed, int bits) {
    uint64_t out = 0, mask = (1u << bits) - 1;
    for (int i = 0; i < 8; ++i) out |= (packed >> (bits * i) & mask) << (8 * i);
    return out;
}

#define LANES 8
#define ROUND(v) std::nearbyint(v)
#define PACK8 pack8
#define UNPACK8 unpack8
#include "loops.inc"

#define VW 4
#define MR 2
#define NR 4
struct V {
    float lane[VW];
};

inline V vzero() { return {{0, 0, 0, 0}}; }
inline V vload(const float* p) {
    V v;
    memcpy(v.lane, p, sizeof v.lane);
    return v;
}
inline V vload_n(const float* p, int64_t n) {
    V v = vzero();
    memcpy(v.lane, p, (size_t)n * sizeof *p);
    return v;
}
inline void vstore(float* p, V v) { memcpy(p, v.lane, sizeof v.lane); }
inline V vfma(V a, V b, V c) {
    for (int i = 0; i < VW; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
inline void vsum4(const V& a, const V& b, const V& c, const V& d, float* out) {
    for (const V* v : {&a, &b, &c, &d})
        *out++ = (v->lane[0] + v->lane[1]) + (v->lane[2] + v->lane[3]);
}

template <bool affine>
void decode8(const int8_t* codes, int64_t n, float scale, int zero, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = (float)(codes[i] - (affine ? zero : 0)) * scale;
}

void decode4(const uint8_t* codes, int64_t n, float scale, int zero, float* out) {
    for (int64_t i = 0; i < n; ++i)
        out[i] = (float)((codes[i / 2] >> 4 * (i & 1) & 15) - 8 - zero) * scale;
}

#include "linear.inc"

}  // namespace

const Table scalar_table = {
    "scalar", VW, NR, range, quantize, dequantize, pack, unpack, decode, arrange, linear};
