// Choosing the instruction set, sharing the work between threads, and the C interface.
#include "qkit.h"

#include <atomic>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "table.h"

namespace {

const Table* const tables[] = {
#if defined(__x86_64__)
    &avx512_table,
    &avx2_table,
#endif
    &scalar_table,
};

bool usable(const Table* table) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2");
    if (table == &avx2_table) return avx2;
    if (table == &avx512_table)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return table == &scalar_table;
}

std::atomic<const Table*> chosen{nullptr};
std::atomic<qkit_pool> pool{nullptr};

const Table& table() {
    const Table* now = chosen.load(std::memory_order_acquire);
    if (!now) {
        qkit_use(nullptr);
        now = chosen.load(std::memory_order_acquire);
    }
    return *now;
}

// Work on fewer values than this is done before other threads have woken up.
constexpr int64_t GRAIN = 1 << 15;

// body(first, last) for pieces of [0, n), each of about `grain` values; `cost` values an item.
template <class Body>
void parallel(int64_t n, int64_t cost, int32_t threads, const Body& body, int64_t grain = GRAIN) {
    int64_t piece = grain / (cost > 0 ? cost : 1) + 1;
    int64_t pieces = (n + piece - 1) / piece;
    qkit_pool run = pool.load(std::memory_order_acquire);
    if (!run || threads <= 1 || pieces <= 1) {
        if (n > 0) body(0, n);
        return;
    }
    struct Job {
        const Body& body;
        int64_t n, piece;
        std::atomic<int64_t> next;
        static void task(void* data) {
            Job& job = *static_cast<Job*>(data);
            for (;;) {
                int64_t first = job.next.fetch_add(job.piece, std::memory_order_relaxed);
                if (first >= job.n) return;
                int64_t last = first + job.piece < job.n ? first + job.piece : job.n;
                job.body(first, last);
            }
        }
    } job{body, n, piece, {0}};
    run(Job::task, &job, (unsigned)(threads < pieces ? threads : pieces), 0);
}

// The pages of a large new result are made when they are first written, which takes longer than
// the work. Asks for pages of 2 MiB (where Linux makes them on request), and returns the grain with
// which two threads seldom make the same one.
template <class T>
int64_t large(T* result, int64_t values, int32_t threads) {
    (void)result;
    int64_t grain = values / (8 * (threads > 0 ? threads : 1));
    if (grain <= GRAIN) return GRAIN;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, at = reinterpret_cast<uintptr_t>(result);
    uintptr_t first = (at + page - 1) & ~(page - 1);
    uintptr_t last = reinterpret_cast<uintptr_t>(result + values) & ~(page - 1);
    if (first + page < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return grain < 1 << 20 ? grain : 1 << 20;
}

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

Weight stored(const uint8_t* weight, int64_t columns, int64_t stride, int32_t bits, int64_t block,
              const float* scale, const int8_t* zero_point, int32_t shared) {
    block = block > 0 && block < columns ? block : columns > 0 ? columns : 1;
    int64_t blocks = shared ? 0 : (columns + block - 1) / block;
    return {weight, columns, stride, block, blocks, bits, scale, zero_point};
}

}  // namespace

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

QKIT_API void qkit_set_pool(qkit_pool run) { pool.store(run, std::memory_order_release); }

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

QKIT_API void qkit_decode(const uint8_t* weight, int64_t n, int64_t columns, int64_t stride,
                          int32_t bits, int64_t block, const float* scale,
                          const int8_t* zero_point, int32_t shared, float* x, int32_t threads) {
    Weight w = stored(weight, columns, stride, bits, block, scale, zero_point, shared);
    auto body = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) table().decode(w, r, 0, columns, x + r * columns);
    };
    parallel(n, columns, threads, body, large(x, n * columns, threads));
}

QKIT_API int64_t qkit_linear_scratch(int64_t rows, int64_t columns) {
    int64_t lanes = table().lanes;
    return (rows < ROWS ? rows : ROWS) * ((columns + lanes - 1) / lanes * lanes);
}

QKIT_API void qkit_linear(const float* x, int64_t rows, const uint8_t* weight, int64_t n,
                          int64_t columns, int64_t stride, int32_t bits, int64_t block,
                          const float* scale, const int8_t* zero_point, int32_t shared,
                          const float* bias, float* out, float* scratch, int32_t threads) {
    Weight w = stored(weight, columns, stride, bits, block, scale, zero_point, shared);
    const Table& use = table();
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t some = rows - r < ROWS ? rows - r : ROWS;
        use.arrange(x + r * columns, some, columns, scratch);
        // A decoded value costs about as much as four rows that meet it.
        int64_t cost = use.strip * columns * (some + 3) / 4;
        parallel((n + use.strip - 1) / use.strip, cost, threads, [&](int64_t first, int64_t last) {
            last = last * use.strip < n ? last * use.strip : n;
            use.linear(scratch, some, w, bias, out + r * n, n, first * use.strip, last);
        });
    }
}
