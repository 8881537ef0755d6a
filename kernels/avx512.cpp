// AVX-512 (F, BW, DQ, VL) with BMI2. Standard headers come before the target, so that no function
// that another file shares is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "table.h"
#include "target.h"

#if !defined(__clang__)
// GCC's own header leaves registers undefined on purpose, and GCC 12 warns of it (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")

namespace {

inline uint64_t lanes_of(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

#define LANES 32
#define ROUND(v) __builtin_nearbyintf(v)
#define PACK8(eight, bits) _pext_u64(eight, lanes_of(bits))
#define UNPACK8(packed, bits) _pdep_u64(packed, lanes_of(bits))
#include "loops.inc"

#define VW 16
#define MR 4
#define NR 6
typedef __m512 V;

inline V vzero() { return _mm512_setzero_ps(); }
inline V vload(const float* p) { return _mm512_loadu_ps(p); }
inline V vload_n(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
inline void vstore(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline void vsum4(V a, V b, V c, V d, float* out) {
    V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    V all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

template <bool affine>
inline __m512 value8(__m128i codes, __m512i zero, __m512 scale) {
    __m512i q = _mm512_cvtepi8_epi32(codes);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(affine ? _mm512_sub_epi32(q, zero) : q), scale);
}

template <bool affine>
void decode8(const int8_t* codes, int64_t n, float scale, int zero, float* out) {
    __m512 s = _mm512_set1_ps(scale);
    __m512i z = _mm512_set1_epi32(zero);
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(out + i,
                         value8<affine>(_mm_loadu_si128((const __m128i*)(codes + i)), z, s));
    if (i < n) {
        __mmask16 some = (__mmask16)((1u << (n - i)) - 1);
        _mm512_mask_storeu_ps(out + i, some,
                              value8<affine>(_mm_maskz_loadu_epi8(some, codes + i), z, s));
    }
}

// All 16 values that a block can have are one register: decoding is looking them up. The low four
// bits of a lane are an index; two broadcasts from memory cost less than spreading the codes.
inline __m512 value4(const uint8_t* codes, __m512 values) {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28,  //
                                             0, 4, 8, 12, 16, 20, 24, 28);
    float low, high;
    memcpy(&low, codes, 4);
    memcpy(&high, codes + 4, 4);
    __m512 both = _mm512_mask_mov_ps(_mm512_set1_ps(low), 0xff00, _mm512_set1_ps(high));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_castps_si512(both), shifts), values);
}

void decode4(const uint8_t* codes, int64_t n, float scale, int zero, float* out) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(steps, _mm512_set1_epi32(zero + 8)));
    values = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, value4(codes + i / 2, values));
    if (i + 8 <= n) {
        uint8_t rest[8] = {0};
        memcpy(rest, codes + i / 2, 4);
        _mm256_storeu_ps(out + i, _mm512_castps512_ps256(value4(rest, values)));
        i += 8;
    }
    if (i < n) {
        uint8_t rest[8] = {0};
        memcpy(rest, codes + i / 2, (size_t)(n - i + 1) / 2);
        _mm512_mask_storeu_ps(out + i, (__mmask16)((1u << (n - i)) - 1), value4(rest, values));
    }
}

#include "linear.inc"

}  // namespace

TARGET_END

const Table avx512_table = {
    "avx512", VW, NR, range, quantize, dequantize, pack, unpack, decode, arrange, linear};
#endif
