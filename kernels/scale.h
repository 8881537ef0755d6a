// The scale of a range, by the rules of qkit.numerics.affine and in its order of rounding. Included
// before any target: what is inlined is compiled for the instruction set that it lands in.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// The least normal fp32 number that is at least x, which is not negative (or is NaN).
static inline float round_up(double x) {
    float y = (float)x;
    if ((double)y < x) {
        uint32_t bits;
        std::memcpy(&bits, &y, sizeof bits);
        ++bits;
        std::memcpy(&y, &bits, sizeof bits);
    }
    return y >= 0x1p-126f ? y : 0x1p-126f;
}

// x, which is not negative, rounded to nearest, but no smaller than the smallest normal number.
static inline float nearest(double x) {
    float y = (float)x;
    return y >= 0x1p-126f ? y : 0x1p-126f;
}

// The code that zero has where codes from qmin to qmax begin at `lo`.
static inline int32_t zero_point_of(double lo, float scale, int32_t qmin, int32_t qmax) {
    int32_t zero = qmin - (int32_t)__builtin_nearbyint(lo / (double)scale);
    return zero < qmin ? qmin : zero > qmax ? qmax : zero;
}
