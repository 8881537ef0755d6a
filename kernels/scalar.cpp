// Portable C++: complete, and the definition of correct.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "scale.h"
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

void decode4(const uint8_t* codes, int64_t n, const float* value, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = value[codes[i / 2] >> 4 * (i & 1) & 15];
}

#include "linear.inc"
#include "half.inc"

#define STRIP 16
#define RL 3
#define CHAINS 0
#define VN 4
struct VI {
    int32_t lane[VN];
};
struct W {
    uint8_t code[4 * VN];
};
struct D {
    int8_t digit[4];
};

inline V vset(float a) { return {{a, a, a, a}}; }
inline V vmul(V a, V b) {
    for (int i = 0; i < VN; ++i) a.lane[i] *= b.lane[i];
    return a;
}
inline V vfused(V a, V b, V c) {
    for (int i = 0; i < VN; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
inline VI viset(int32_t a) { return {{a, a, a, a}}; }
inline VI viadd(VI a, VI b) {
    for (int i = 0; i < VN; ++i) a.lane[i] += b.lane[i];
    return a;
}
inline V vfloat(VI a) {
    V f;
    for (int i = 0; i < VN; ++i) f.lane[i] = (float)a.lane[i];
    return f;
}
inline W wload(const uint8_t* p) {
    W w;
    memcpy(w.code, p, sizeof w.code);
    return w;
}
inline D dload(const int8_t* p) {
    D d;
    memcpy(d.digit, p, sizeof d.digit);
    return d;
}
inline VI vdot(VI s, const W& w, D d) {
    for (int i = 0; i < VN; ++i)
        for (int j = 0; j < 4; ++j) s.lane[i] += w.code[4 * i + j] * d.digit[j];
    return s;
}
#include "spread.inc"
#include "integer.inc"

}  // namespace

const Table scalar_table = {
    "scalar", VW,    NR,     range,  quantize, dequantize, pack, unpack,  decode,
    arrange,  linear, STRIP, RL,     false,    false, widen,      narrow, digits, ones, integer,
    nullptr};
