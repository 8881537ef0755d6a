// NEON, which every 64-bit ARM processor has, and the same with products of bytes (dot product).
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "scale.h"
#include "table.h"
#include "target.h"

namespace {

// Of two neighbours of `width` bits in each lane (of which `lanes` has the lowest bits), the upper
// one comes down by `gap` to stand beside the lower one, or goes back up.
inline uint64_t join(uint64_t x, int width, int gap, uint64_t lanes) {
    uint64_t lower = ((1ull << width) - 1) * lanes;
    return (x & lower) | (x >> gap & lower << width);
}
inline uint64_t part(uint64_t x, int width, int gap, uint64_t lanes) {
    uint64_t lower = ((1ull << width) - 1) * lanes;
    return (x & lower) | (x & lower << width) << gap;
}

inline uint64_t pack8(uint64_t eight, int bits) {
    uint64_t pairs = join(eight, bits, 8 - bits, 0x0001000100010001);
    uint64_t fours = join(pairs, 2 * bits, 16 - 2 * bits, 0x0000000100000001);
    return join(fours, 4 * bits, 32 - 4 * bits, 1);
}
inline uint64_t unpack8(uint64_t packed, int bits) {
    uint64_t fours = part(packed, 4 * bits, 32 - 4 * bits, 1);
    uint64_t pairs = part(fours, 2 * bits, 16 - 2 * bits, 0x0000000100000001);
    return part(pairs, bits, 8 - bits, 0x0001000100010001);
}

#define LANES 16
#define ROUND(v) __builtin_nearbyintf(v)
#define PACK8 pack8
#define UNPACK8 unpack8
#include "loops.inc"

#define VW 4
#define MR 4
#define NR 4
typedef float32x4_t V;

inline V vzero() { return vdupq_n_f32(0); }
inline V vload(const float* p) { return vld1q_f32(p); }
inline V vload_n(const float* p, int64_t n) {
    float some[VW] = {0};
    memcpy(some, p, (size_t)n * sizeof *p);
    return vld1q_f32(some);
}
inline void vstore(float* p, V v) { vst1q_f32(p, v); }
inline V vfma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline void vsum4(V a, V b, V c, V d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

// Eight codes, which the zero point makes 16 bits wide, as values.
inline void values(int16x8_t codes, float32x4_t scale, float* out) {
    float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)));
    float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(codes));
    vst1q_f32(out, vmulq_f32(low, scale));
    vst1q_f32(out + 4, vmulq_f32(high, scale));
}

template <bool affine>
void decode8(const int8_t* codes, int64_t n, float scale, int zero, float* out) {
    float32x4_t s = vdupq_n_f32(scale);
    int16x8_t z = vdupq_n_s16((int16_t)zero);
    for (; n >= 8; n -= 8, codes += 8, out += 8) {
        int16x8_t q = vmovl_s8(vld1_s8(codes));
        values(affine ? vsubq_s16(q, z) : q, s, out);
    }
    for (; n > 0; --n, ++codes, ++out) *out = (float)(*codes - zero) * scale;
}

void decode4(const uint8_t* codes, int64_t n, const float* value, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = value[codes[i / 2] >> 4 * (i & 1) & 15];
}

#include "linear.inc"

#define HALF
void half_to(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 4) {
        uint16_t four[4] = {0};
        float wide[4];
        size_t count = (size_t)(n - i < 4 ? n - i : 4);
        memcpy(four, x + i, count * sizeof *x);
        vst1q_f32(wide, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(four))));
        memcpy(out + i, wide, count * sizeof *out);
    }
}
void half_from(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += 4) {
        float four[4] = {0};
        uint16_t narrow[4];
        size_t count = (size_t)(n - i < 4 ? n - i : 4);
        memcpy(four, x + i, count * sizeof *x);
        vst1_u16(narrow, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(four))));
        memcpy(out + i, narrow, count * sizeof *out);
    }
}
#include "half.inc"

#define STRIP 16
#define RL 3
#define CHAINS 0
#define VN 4
typedef int32x4_t VI;

inline V vset(float a) { return vdupq_n_f32(a); }
inline V vmul(V a, V b) { return vmulq_f32(a, b); }
inline V vfused(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline VI viset(int32_t a) { return vdupq_n_s32(a); }
inline VI viadd(VI a, VI b) { return vaddq_s32(a, b); }
inline V vfloat(VI a) { return vcvtq_f32_s32(a); }
inline int8x16_t four_digits(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
#include "spread.inc"

namespace words {

struct W {
    int16x8_t low, high;
};
typedef int16x4_t D;

inline W wload(const uint8_t* p) {
    uint8x16_t codes = vld1q_u8(p);
    return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))),
            vreinterpretq_s16_u16(vmovl_high_u8(codes))};
}
inline D dload(const int8_t* p) { return vget_low_s16(vmovl_s8(vget_low_s8(four_digits(p)))); }
inline VI vdot(VI s, const W& w, D d) {
    int32x4_t a = vmull_s16(vget_low_s16(w.low), d), b = vmull_s16(vget_high_s16(w.low), d);
    int32x4_t c = vmull_s16(vget_low_s16(w.high), d), e = vmull_s16(vget_high_s16(w.high), d);
    return vaddq_s32(s, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, e)));
}
#include "integer.inc"

}  // namespace words

}  // namespace

TARGET_BEGIN("arch=armv8.2-a+dotprod")

namespace {
namespace bytes {

typedef int8x16_t W;
struct D {
    int8x16_t digits;
    int32x4_t shift;  // 128 times their sum: the codes are made signed
};

inline W wload(const uint8_t* p) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}
inline D dload(const int8_t* p) {
    int8x16_t digits = four_digits(p);
    int32x4_t most = vdotq_s32(vdupq_n_s32(0), digits, vdupq_n_s8(127));
    return {digits, vdotq_s32(most, digits, vdupq_n_s8(1))};
}
inline VI vdot(VI s, W w, const D& d) { return vdotq_s32(vaddq_s32(s, d.shift), w, d.digits); }
#include "integer.inc"

}  // namespace bytes
}  // namespace

TARGET_END

const Table neon_table = {
    "neon",  VW,     NR,    range, quantize, dequantize, pack,  unpack, decode,
    arrange, linear, STRIP, RL,    false,    false,      widen, narrow, words::digits,
    words::ones, words::integer, nullptr};

const Table dotprod_table = {
    "dotprod", VW,     NR,    range, quantize, dequantize, pack,  unpack, decode,
    arrange,   linear, STRIP, RL,    false,    false,      widen, narrow, bytes::digits,
    bytes::ones, bytes::integer, nullptr};
#endif
