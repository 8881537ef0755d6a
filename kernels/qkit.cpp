// Choosing the instruction set, sharing the work between threads, and the C interface.
#include "qkit.h"

#include <atomic>
#include <cmath>
#include <cstring>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "pool.h"
#include "scale.h"
#include "table.h"

namespace {

const Table* const tables[] = {
#if defined(__x86_64__)
    &vnni_table,
    &avx512_table,
    &avx2_table,
#elif defined(__aarch64__)
    &dotprod_table,
    &neon_table,
#endif
    &scalar_table,
};

#if defined(__aarch64__)
bool dot_product() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every other system that we know requires it
#endif
}
#endif

bool usable(const Table* table) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    if (table == &avx2_table) return avx2;
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (table == &avx512_table) return avx512;
    if (table == &vnni_table) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
    if (table == &neon_table) return true;  // part of the 64-bit architecture
    if (table == &dotprod_table) return dot_product();
#endif
    return table == &scalar_table;
}

std::atomic<const Table*> chosen{nullptr};

// A row (or, of a single long row, a run of whole blocks) is the unit of work.
struct Rows {
    int64_t rows, columns, block, blocks;
};

Rows shape(int64_t rows, int64_t columns, int64_t block) {
    if (columns > 0 && block > 0 && columns % block == 0) {
        // Whole blocks only: then rows do not matter, and one long row is shared as well.
        return {rows * (columns / block), block, block, 1};
    }
    return {rows, columns, block, block > 0 ? (columns + block - 1) / block : 0};
}

// The scale (and zero point) of the range [lo, hi]; false where it overflows or is not finite.
bool choose(double lo, double hi, int32_t qmin, int32_t qmax, float* scale, int8_t* zero_point) {
    double below = -lo, exact, farthest;
    double greater = below > hi ? below : hi, lesser = below > hi ? hi : below;
    if (!std::isfinite(below) || !std::isfinite(hi)) return false;
    if (zero_point) {
        exact = (hi - lo) / (qmax - qmin);
    } else if (qmin == -qmax) {
        exact = greater / qmax;
    } else {
        double one = greater / -qmin, other = lesser / (qmax + 0.5);
        exact = one > other ? one : other;
    }
    float s = round_up(exact);
    if (zero_point) {
        int32_t zero = zero_point_of(lo, s, qmin, qmax);
        *zero_point = (int8_t)zero;
        farthest = qmax - zero > zero - qmin ? qmax - zero : zero - qmin;
    } else {
        farthest = qmax > -qmin ? qmax : -qmin;
    }
    *scale = !zero_point && qmin != -qmax && hi > below ? -s : s;
    return std::isfinite((float)((double)s * farthest));
}

}  // namespace

std::atomic<qkit_pool> pool{nullptr};

const Table& table() {
    const Table* now = chosen.load(std::memory_order_acquire);
    if (!now) {
        qkit_use(nullptr);
        now = chosen.load(std::memory_order_acquire);
    }
    return *now;
}

QKIT_API int32_t qkit_abi() { return QKIT_ABI; }

QKIT_API const char* qkit_use(const char* isa) {
    for (const Table* each : tables)
        if (isa ? !std::strcmp(isa, each->name) : usable(each)) {
            if (!usable(each)) return nullptr;
            chosen.store(each, std::memory_order_release);
            return each->name;
        }
    return nullptr;
}

QKIT_API void qkit_set_pool(qkit_pool run) {
#if defined(__unix__) || defined(__APPLE__)
    // A forked process has the pool's memory but none of its threads: work must not wait for them.
    static const int once = pthread_atfork(
        nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    (void)once;
#endif
    pool.store(run, std::memory_order_release);
}

QKIT_API void qkit_keep(const void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int collapse = 25;  // MADV_COLLAPSE, newer than many a header
    LargePages pages(memory, bytes);
    // An older kernel does the same in its own time.
    if (!pages.advise(collapse)) pages.advise(MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

QKIT_API void qkit_range(const float* x, int64_t rows, int64_t columns, int64_t block, float* lo,
                         float* hi, int32_t threads) {
    Rows m = shape(rows, columns, block);
    parallel(m.rows, m.columns, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            table().range(x + r * m.columns, m.columns, m.block, lo + r * m.blocks,
                          hi + r * m.blocks);
    });
}

QKIT_API void qkit_quantize(const float* x, int64_t rows, int64_t columns, int64_t block,
                            const float* scale, const int8_t* zero_point, int32_t qmin,
                            int32_t qmax, int8_t* codes, int32_t threads) {
    Rows m = shape(rows, columns, block);
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            table().quantize(x + r * m.columns, m.columns, m.block, scale + r * m.blocks,
                             zero_point ? zero_point + r * m.blocks : nullptr, qmin, qmax,
                             codes + r * m.columns);
    };
    parallel(m.rows, m.columns, threads, body, large(codes, rows * columns, threads));
}

QKIT_API int32_t qkit_quantize_minmax(const float* x, int64_t rows, int64_t columns, int64_t block,
                                      int32_t qmin, int32_t qmax, float* scale, int8_t* zero_point,
                                      int8_t* codes, int32_t threads) {
    Rows m = shape(rows, columns, block);
    if (m.blocks == 0) return 1;
    if (m.blocks == 1) m.block = m.columns;  // a block that is longer than the row ends with it
    std::atomic<bool> good{true};
    // A run of n values that blocks cut in pieces, the first of them number `at`.
    auto run = [&](const float* from, int64_t n, int64_t at, int8_t* to) {
        const Table& isa = table();
        constexpr int64_t MOST = 32;  // blocks, so that one's divisions overlap with another's
        float lo[MOST], hi[MOST];
        bool all = true;
        int64_t near = NEAR / m.block;
        int64_t step = m.block * (near < 1 ? 1 : near > MOST ? MOST : near);
        for (int64_t i = 0; i < n; i += step) {
            int64_t some = n - i < step ? n - i : step, count = (some + m.block - 1) / m.block;
            int8_t* zero = zero_point ? zero_point + at : nullptr;
            bool fine = true;
            isa.range(from + i, some, m.block, lo, hi);
            for (int64_t b = 0; b < count; ++b)
                fine &= choose(lo[b], hi[b], qmin, qmax, scale + at + b, zero ? zero + b : nullptr);
            if (fine)
                isa.quantize(from + i, some, m.block, scale + at, zero, qmin, qmax, to + i);
            all &= fine;
            at += count;
        }
        if (!all) good.store(false, std::memory_order_relaxed);
    };
    auto body = [&](int64_t first, int64_t last) {
        if (m.blocks == 1)  // one run of whole blocks
            return run(x + first * m.columns, (last - first) * m.columns, first,
                       codes + first * m.columns);
        for (int64_t r = first; r < last; ++r)
            run(x + r * m.columns, m.columns, r * m.blocks, codes + r * m.columns);
    };
    parallel(m.rows, m.columns, threads, body, large(codes, rows * columns, threads));
    return good.load(std::memory_order_relaxed);
}

QKIT_API void qkit_dequantize(const int8_t* codes, int64_t rows, int64_t columns, int64_t block,
                              const float* scale, const int8_t* zero_point, float* x,
                              int32_t threads) {
    Rows m = shape(rows, columns, block);
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            table().dequantize(codes + r * m.columns, m.columns, m.block, scale + r * m.blocks,
                               zero_point ? zero_point + r * m.blocks : nullptr,
                               x + r * m.columns);
    };
    parallel(m.rows, m.columns, threads, body, large(x, rows * columns, threads));
}

QKIT_API int32_t qkit_pack(const uint8_t* codes, int64_t rows, int64_t columns, int32_t bits,
                           int32_t offset, uint8_t* stream, int64_t stride, int32_t threads) {
    std::atomic<bool> fit{true};
    auto body = [&](int64_t first, int64_t last) {
        bool all = true;
        for (int64_t r = first; r < last; ++r)
            all &= table().pack(codes + r * columns, columns, bits, offset, stream + r * stride,
                                stride);
        if (!all) fit.store(false, std::memory_order_relaxed);
    };
    parallel(rows, columns, threads, body, large(stream, rows * stride, threads));
    return fit.load(std::memory_order_relaxed);
}

QKIT_API void qkit_unpack(const uint8_t* stream, int64_t rows, int64_t columns, int32_t bits,
                          int32_t offset, uint8_t* codes, int64_t stride, int32_t threads) {
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            table().unpack(stream + r * stride, columns, bits, offset, codes + r * columns);
    };
    parallel(rows, columns, threads, body, large(codes, rows * columns, threads));
}
