// NEON, which every 64-bit ARM processor has: no flags and no target are needed.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "table.h"

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

void decode4(const uint8_t* codes, int64_t n, float scale, int zero, float* out) {
    float32x4_t s = vdupq_n_f32(scale);
    int16x8_t z = vdupq_n_s16((int16_t)(zero + 8));
    for (; n >= 16; n -= 16, codes += 8, out += 16) {
        uint8x8_t bytes = vld1_u8(codes), even = vand_u8(bytes, vdup_n_u8(15));
        uint8x8_t odd = vshr_n_u8(bytes, 4);
        int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vzip1_u8(even, odd)));
        int16x8_t second = vreinterpretq_s16_u16(vmovl_u8(vzip2_u8(even, odd)));
        values(vsubq_s16(first, z), s, out);
        values(vsubq_s16(second, z), s, out + 8);
    }
    for (int64_t i = 0; i < n; ++i)
        out[i] = (float)((codes[i / 2] >> 4 * (i & 1) & 15) - 8 - zero) * scale;
}

#include "linear.inc"

}  // namespace

const Table neon_table = {
    "neon", VW, NR, range, quantize, dequantize, pack, unpack, decode, arrange, linear};
#endif
