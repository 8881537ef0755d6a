// AVX2 with BMI2. Standard headers come before the target, so that no function that another
// file shares is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "table.h"
#include "target.h"

TARGET_BEGIN("avx2,fma,bmi2")

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

void decode4(const uint8_t* codes, int64_t n, float scale, int zero, float* out) {
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    __m256 s = _mm256_set1_ps(scale);
    __m256i z = _mm256_set1_epi32(zero + 8), low = _mm256_set1_epi32(15);
    for (; n >= 8; n -= 8, codes += 4, out += 8) {
        int word;
        memcpy(&word, codes, 4);
        __m256i q = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), low);
        q = _mm256_sub_epi32(q, z);
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(q), s));
    }
    for (int64_t i = 0; i < n; ++i)
        out[i] = (float)((codes[i / 2] >> 4 * (i & 1) & 15) - 8 - zero) * scale;
}

#include "linear.inc"

}  // namespace

TARGET_END

const Table avx2_table = {
    "avx2", VW, NR, range, quantize, dequantize, pack, unpack, decode, arrange, linear};
#endif
