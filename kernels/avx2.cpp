// AVX2 with BMI2. Standard headers come before the target, so that no function that another
// file shares is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "scale.h"
#include "table.h"
#include "target.h"

TARGET_BEGIN("avx2,fma,bmi2,f16c")

namespace {

inline uint64_t lanes_of(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

#define LANES 32
#define ROUND(v) __builtin_nearbyintf(v)
#define PACK8(eight, bits) _pext_u64(eight, lanes_of(bits))
#define UNPACK8(packed, bits) _pdep_u64(packed, lanes_of(bits))
#include "loops.inc"

#define VW 8
#define MR 2
#define NR 6
typedef __m256 V;

inline V vzero() { return _mm256_setzero_ps(); }
inline V vload(const float* p) { return _mm256_loadu_ps(p); }
inline V vload_n(const float* p, int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes));
}
inline void vstore(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline void vsum4(V a, V b, V c, V d, float* out) {
    V all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

template <bool affine>
void decode8(const int8_t* codes, int64_t n, float scale, int zero, float* out) {
    __m256 s = _mm256_set1_ps(scale);
    __m256i z = _mm256_set1_epi32(zero);
    for (; n >= 8; n -= 8, codes += 8, out += 8) {
        __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes));
        if (affine) q = _mm256_sub_epi32(q, z);
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(q), s));
    }
    for (; n > 0; --n, ++codes, ++out) *out = (float)(*codes - zero) * scale;
}

void decode4(const uint8_t* codes, int64_t n, const float* value, float* out) {
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    __m256 low = _mm256_loadu_ps(value), high = _mm256_loadu_ps(value + 8);
    for (; n >= 8; n -= 8, codes += 4, out += 8) {
        int word;
        memcpy(&word, codes, 4);
        // The low three bits of a lane look up in either half, the fourth chooses between them.
        __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        _mm256_storeu_ps(out, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                               _mm256_permutevar8x32_ps(high, code), choice));
    }
    for (int64_t i = 0; i < n; ++i) out[i] = value[codes[i / 2] >> 4 * (i & 1) & 15];
}

#include "linear.inc"

#define HALF
void half_to(const uint16_t* x, int64_t n, float* out) {
    for (; n >= 8; n -= 8, x += 8, out += 8)
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)));
    for (; n > 0; --n) *out++ = _cvtsh_ss(*x++);
}
void half_from(const float* x, int64_t n, uint16_t* out) {
    for (; n >= 8; n -= 8, x += 8, out += 8)
        _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(_mm256_loadu_ps(x), 0));
    for (; n > 0; --n) *out++ = _cvtss_sh(*x++, 0);
}
#include "half.inc"

#define STRIP 16
#define RL 3
#define CHAINS 2
#define VN 8
typedef __m256i VI;
typedef __m256i D;
struct W {
    __m256i even, odd;  // of the four codes of a row, as 16 bits
};

inline V vset(float a) { return _mm256_set1_ps(a); }
inline V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V vfused(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline VI viset(int32_t a) { return _mm256_set1_epi32(a); }
inline VI viadd(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline V vfloat(VI a) { return _mm256_cvtepi32_ps(a); }
inline W wload(const uint8_t* p) {
    __m256i codes = _mm256_load_si256((const __m256i*)p);
    return {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)};
}
inline D dload(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
// Not the instruction that multiplies bytes: it saturates.
inline VI vdot(VI s, const W& w, D d) {
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(d, 8), 8), odd = _mm256_srai_epi16(d, 8);
    s = _mm256_add_epi32(s, _mm256_madd_epi16(w.even, even));
    return _mm256_add_epi32(s, _mm256_madd_epi16(w.odd, odd));
}
#include "spread.inc"
#include "integer.inc"

}  // namespace

TARGET_END

const Table avx2_table = {
    "avx2",  VW,     NR,    range, quantize, dequantize, pack,   unpack, decode,
    arrange, linear, STRIP, RL,    false,    false, widen,      narrow, digits, ones,   integer,
    nullptr};
#endif
