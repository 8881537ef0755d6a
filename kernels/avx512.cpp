// AVX-512 (F, BW, DQ, VL) with BMI2, and the same with VNNI. Standard headers come before the
// target, so that no function that another file shares is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "scale.h"
#include "table.h"
#include "target.h"

#if !defined(__clang__)
// GCC's own header leaves registers undefined on purpose, and GCC 12 warns of it (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")

namespace {

inline uint64_t lanes_of(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

#define OWN_QUANTIZE
#define ROUND(v) __builtin_nearbyintf(v)
#define PACK8(eight, bits) _pext_u64(eight, lanes_of(bits))
#define UNPACK8(packed, bits) _pdep_u64(packed, lanes_of(bits))
#include "loops.inc"

// By hand, because groups are so short that starting and ending counts.
void range(const float* x, int64_t n, int64_t block, float* lo, float* hi) {
    for (int64_t start = 0; start < n; start += block, ++lo, ++hi) {
        int64_t stop = start + block < n ? start + block : n, i = start;
        __m512 least = _mm512_setzero_ps(), greatest = least;
        __mmask16 odd = 0;
        for (; i < stop; i += 16) {
            __mmask16 some = (__mmask16)(stop - i < 16 ? (1u << (stop - i)) - 1 : 0xffff);
            __m512 v = _mm512_maskz_loadu_ps(some, x + i);
            least = _mm512_min_ps(v, least);
            greatest = _mm512_max_ps(v, greatest);
            odd |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN of either kind, infinity of either sign
        }
        // Both at once: the least value is the greatest of the negated ones.
        least = _mm512_sub_ps(_mm512_setzero_ps(), least);
        __m512 both = _mm512_max_ps(_mm512_shuffle_f32x4(least, greatest, 0x44),
                                    _mm512_shuffle_f32x4(least, greatest, 0xee));
        both = _mm512_max_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
        both = _mm512_max_ps(both, _mm512_permute_ps(both, 0x4e));
        both = _mm512_max_ps(both, _mm512_permute_ps(both, 0xb1));
        *lo = odd ? NAN : 0.0f - _mm512_cvtss_f32(both);
        *hi = odd ? NAN : _mm512_cvtss_f32(_mm512_shuffle_f32x4(both, both, 0xaa));
    }
}

// 16 ANS states make a step; those that fall below the bound take the next words, in order.
inline __m512i ans_step(const AnsTable& table, uint32_t bits, __m512i x, const uint8_t** p,
                        uint8_t* out) {
    __m512i slot = _mm512_and_si512(x, _mm512_set1_epi32((1 << bits) - 1));
    __m512i step = _mm512_i32gather_epi32(slot, table.step, 4);
    __m512i symbol = _mm512_i32gather_epi32(slot, table.symbol, 1);
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(symbol));
    x = _mm512_mullo_epi32(_mm512_and_si512(step, _mm512_set1_epi32(0xffff)),
                           _mm512_srli_epi32(x, bits));
    x = _mm512_add_epi32(x, _mm512_srli_epi32(step, 16));
    __mmask16 low = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(AnsTable::lower_bound));
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)*p));
    *p += 2 * _mm_popcnt_u32(low);
    x = _mm512_mask_slli_epi32(x, low, x, 16);
    return _mm512_or_si512(x, _mm512_maskz_expand_epi32(low, words));
}

uint64_t ans_rounds(const AnsTable& table, uint32_t bits, uint32_t* x, const uint8_t** p,
                    const uint8_t* end, uint8_t* out, uint64_t count) {
    __m512i lo = _mm512_loadu_si512(x), hi = _mm512_loadu_si512(x + 16);
    uint64_t i = 0;
    for (; i + 32 <= count && end - *p >= 64; i += 32) {
        lo = ans_step(table, bits, lo, p, out + i);
        hi = ans_step(table, bits, hi, p, out + i + 16);
    }
    _mm512_storeu_si512(x, lo);
    _mm512_storeu_si512(x + 16, hi);
    return i;
}

void quantize(const float* x, int64_t n, int64_t block, const float* scale,
              const int8_t* zero_point, int32_t qmin, int32_t qmax, int8_t* codes) {
    __m512 least = _mm512_set1_ps((float)qmin), greatest = _mm512_set1_ps((float)qmax);
    for (int64_t start = 0; start < n; start += block, ++scale) {
        int64_t stop = start + block < n ? start + block : n, i = start;
        __m512 s = _mm512_set1_ps(*scale);
        __m512 z = _mm512_set1_ps(zero_point ? (float)*zero_point++ : 0.0f);
        auto code = [&](__m512 v) {
            v = _mm512_roundscale_ps(_mm512_div_ps(v, s), _MM_FROUND_TO_NEAREST_INT);
            v = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(v, z), least), greatest);
            return _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v));
        };
        for (; i + 16 <= stop; i += 16) {
            // Divisions leave time to fetch what comes next, also into the next page.
            _mm_prefetch((const char*)(x + i + NEAR), _MM_HINT_T1);
            _mm_storeu_si128((__m128i*)(codes + i), code(_mm512_loadu_ps(x + i)));
        }
        if (i < stop) {
            __mmask16 some = (__mmask16)((1u << (stop - i)) - 1);
            _mm_mask_storeu_epi8(codes + i, some, code(_mm512_maskz_loadu_ps(some, x + i)));
        }
    }
}

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

void decode4(const uint8_t* codes, int64_t n, const float* value, float* out) {
    const __m512 values = _mm512_loadu_ps(value);
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

#define HALF
void half_to(const uint16_t* x, int64_t n, float* out) {
    for (; n > 0; n -= 16, x += 16, out += 16) {
        __mmask16 some = n < 16 ? (__mmask16)((1u << n) - 1) : 0xffff;
        _mm512_mask_storeu_ps(out, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x)));
    }
}
void half_from(const float* x, int64_t n, uint16_t* out) {
    for (; n > 0; n -= 16, x += 16, out += 16) {
        __mmask16 some = n < 16 ? (__mmask16)((1u << n) - 1) : 0xffff;
        _mm256_mask_storeu_epi16(out, some,
                                 _mm512_cvtps_ph(_mm512_maskz_loadu_ps(some, x), 0));
    }
}
#include "half.inc"

#define STRIP 32
#define VN 16
typedef __m512i VI;

inline V vset(float a) { return _mm512_set1_ps(a); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vfused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline VI viset(int32_t a) { return _mm512_set1_epi32(a); }
inline VI viadd(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline V vfloat(VI a) { return _mm512_cvtepi32_ps(a); }

// 16 rows of 16 dwords become 16 columns.
inline void transpose(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now r[4q + j] holds, in its lanes of 128 bits, column 4l + j of the rows 4q .. 4q + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[8 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

// Dword t of 16 rows, as the steps that it holds: see spread.inc.
template <int bits>
inline void put_steps(__m512i dwords, uint8_t* out) {
    constexpr int pack = bits ? 8 / bits : 1;
    const __m512i mask = _mm512_set1_epi8(bits && bits < 8 ? (1 << bits) - 1 : -1);
#pragma GCC unroll 8
    for (int j = 0; j < pack; ++j) {
        __m512i four = dwords;
        if (j) four = _mm512_srli_epi16(four, (unsigned)(bits * j));
        if (bits && bits < 8) four = _mm512_and_si512(four, mask);
        if (bits == 8) four = _mm512_xor_si512(four, _mm512_set1_epi8(-128));
        _mm512_store_si512(out + j * STRIP * 4, four);
    }
}

template <int bits>
inline void spread_as(const uint8_t* const* from, int64_t bytes, int64_t ahead, uint8_t* out) {
    constexpr int64_t step = (bits ? 8 / bits : 1) * STRIP * 4;
    int64_t at = 0;
    __m512i r[16];
    for (; at + 64 <= bytes; at += 64, out += 16 * step) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            r[i] = _mm512_loadu_si512(from[i] + at);
            if (bits) __builtin_prefetch(from[i] + at + ahead, 0, 2);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) put_steps<bits>(r[t], out + t * step);
    }
    if (at == bytes) return;
    __mmask64 some = (1ull << (bytes - at)) - 1;
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi8(some, from[i] + at);
    transpose(r);
    for (int t = 0; at < bytes; ++t, at += 4) put_steps<bits>(r[t], out + t * step);
}

// Four floats of 16 rows each become columns; of those, the first ones that `some` says.
inline void turn_four(const float* const* from, int64_t k, __mmask8 some, float* out,
                      int64_t stride) {
    __m512 v[4];  // of the rows i, 4 + i, 8 + i and 12 + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_castps128_ps512(_mm_maskz_loadu_ps(some, from[i] + k));
        v[i] = _mm512_insertf32x4(v[i], _mm_maskz_loadu_ps(some, from[4 + i] + k), 1);
        v[i] = _mm512_insertf32x4(v[i], _mm_maskz_loadu_ps(some, from[8 + i] + k), 2);
        v[i] = _mm512_insertf32x4(v[i], _mm_maskz_loadu_ps(some, from[12 + i] + k), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    _mm512_storeu_pd(out, _mm512_unpacklo_pd(a, c));
    if (some & 2) _mm512_storeu_pd(out + stride, _mm512_unpackhi_pd(a, c));
    if (some & 4) _mm512_storeu_pd(out + 2 * stride, _mm512_unpacklo_pd(b, d));
    if (some & 8) _mm512_storeu_pd(out + 3 * stride, _mm512_unpackhi_pd(b, d));
}

void turn(const float* const* from, int64_t count, float* out, int64_t stride) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) turn_four(from, k, 15, out + k * stride, stride);
    if (k < count)
        turn_four(from, k, (__mmask8)((1u << (count - k)) - 1), out + k * stride, stride);
}

template <int P>
void comb(const int8_t* from, int64_t length, int8_t* out) {
    const __m512i order =
        _mm512_broadcast_i32x4(P == 2   ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7,  //
                                                        8, 10, 12, 14, 9, 11, 13, 15)
                               : P == 4 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13,  //
                                                        2, 6, 10, 14, 3, 7, 11, 15)
                                        : _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11,  //
                                                        4, 12, 5, 13, 6, 14, 7, 15));
    for (int64_t at = 0; at < length; at += 64) {
        __mmask64 some = length - at < 64 ? (1ull << (length - at)) - 1 : ~0ull;
        __m512i bytes = _mm512_maskz_loadu_epi8(some, from + at);
        bytes = _mm512_shuffle_epi8(bytes, order);
        if (P == 8) {  // from neighbours of 16 bytes, which hold pairs, to their fours
            __m512i other = _mm512_shuffle_i32x4(bytes, bytes, 0xb1);
            bytes = _mm512_mask_mov_epi32(_mm512_unpacklo_epi16(bytes, other), 0xf0f0,
                                          _mm512_unpackhi_epi16(other, bytes));
        }
        _mm512_mask_storeu_epi8(out + at, some, bytes);
    }
}

void spread(const uint8_t* const* from, int64_t bytes, int bits, int64_t ahead, uint8_t* out) {
    if (bits == 8) spread_as<8>(from, bytes, ahead, out);
    if (bits == 4) spread_as<4>(from, bytes, ahead, out);
    if (bits == 2) spread_as<2>(from, bytes, ahead, out);
    if (bits == 1) spread_as<1>(from, bytes, ahead, out);
    if (bits == 0) spread_as<0>(from, bytes, ahead, out);
}

namespace words {

#define RL 6
#define CHAINS 2
typedef __m512i D;
struct W {
    __m512i even, odd;  // of the four codes of a row, as 16 bits
};

inline W wload(const uint8_t* p) {
    __m512i codes = _mm512_load_si512(p);
    return {_mm512_and_si512(codes, _mm512_set1_epi16(255)), _mm512_srli_epi16(codes, 8)};
}
inline D dload(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
// Not the instruction that multiplies bytes: it saturates.
inline VI vdot(VI s, const W& w, D d) {
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(d, 8), 8), odd = _mm512_srai_epi16(d, 8);
    s = _mm512_add_epi32(s, _mm512_madd_epi16(w.even, even));
    return _mm512_add_epi32(s, _mm512_madd_epi16(w.odd, odd));
}
#include "integer.inc"
constexpr int rl = RL;
#undef RL
#undef CHAINS

}  // namespace words

}  // namespace

TARGET_END
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")

namespace {
namespace bytes {

#define RL 12
#define CHAINS 8
typedef __m512i W;
typedef __m512i D;

inline W wload(const uint8_t* p) { return _mm512_load_si512(p); }
inline D dload(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
inline VI vdot(VI s, W w, D d) {
    // In place, by name: of the intrinsic, GCC 12 keeps two dozen sums in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(w), "v"(d));
    return s;
}
#define STREAM
#include "integer.inc"

}  // namespace bytes
}  // namespace

TARGET_END

const Table avx512_table = {
    "avx512", VW,     NR,    range,     quantize, dequantize, pack,   unpack,        decode,
    arrange,  linear, STRIP, words::rl, false,    false,      widen,  narrow,        words::digits,
    words::ones, words::integer, ans_rounds};

const Table vnni_table = {
    "avx512vnni", VW,     NR,    range, quantize, dequantize, pack,   unpack,        decode,
    arrange,      linear, STRIP, RL,    true,     true,       widen,  narrow,        bytes::digits,
    bytes::ones, bytes::integer, ans_rounds};
#endif
