// Sharing work between the threads of the pool that the process already has.
#pragma once
#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "qkit.h"
#include "table.h"

extern std::atomic<qkit_pool> pool;

// The instruction set in use.
const Table& table();

// Work on fewer values than this is done before other threads have woken up.
constexpr int64_t GRAIN = 1 << 15;

// body(first, last) for pieces of [0, n), the first ones large (so that what a thread does lies side
// by side) and the last ones small (so that all threads end together), none below about `grain`
// values; `cost` values an item.
template <class Body>
void parallel(int64_t n, int64_t cost, int32_t threads, const Body& body, int64_t grain = GRAIN) {
    int64_t least = grain / (cost > 0 ? cost : 1) + 1;
    int64_t pieces = (n + least - 1) / least;
    qkit_pool run = pool.load(std::memory_order_acquire);
    if (!run || threads <= 1 || pieces <= 1) {
        if (n > 0) body(0, n);
        return;
    }
    struct Job {
        const Body& body;
        int64_t n, least, threads;
        std::atomic<int64_t> next;
        static void task(void* data) {
            Job& job = *static_cast<Job*>(data);
            int64_t first = job.next.load(std::memory_order_relaxed);
            while (first < job.n) {
                int64_t piece = 3 * (job.n - first) / (4 * job.threads);
                if (piece < job.least) piece = job.least;
                int64_t last = first + piece < job.n ? first + piece : job.n;
                if (!job.next.compare_exchange_weak(first, last, std::memory_order_relaxed))
                    continue;
                job.body(first, last);
                first = job.next.load(std::memory_order_relaxed);
            }
        }
    } job{body, n, least, threads, {0}};
    run(Job::task, &job, (unsigned)(threads < pieces ? threads : pieces), 0);
}

// What is a large page where Linux makes them on request: from the first to before the last address
// of those that lie within some memory; else nothing does.
struct LargePages {
    uintptr_t first = 0, last = 0;

    LargePages(const void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        const uintptr_t page = 1 << 21, at = reinterpret_cast<uintptr_t>(memory);
        first = (at + page - 1) & ~(page - 1);
        last = (at + (uintptr_t)bytes) & ~(page - 1);
#else
        (void)memory, (void)bytes;
#endif
    }

    // Whether there are any and the system takes the advice.
    bool advise(int advice) const {
#if defined(__linux__)
        return first < last && !madvise(reinterpret_cast<void*>(first), last - first, advice);
#else
        (void)advice;
        return false;
#endif
    }
};

// The pages of a large new result are made when they are first written, which takes longer than
// the work. Asks for pages of 2 MiB (where Linux makes them on request), and returns the grain with
// which two threads seldom make the same one.
template <class T>
int64_t large(T* result, int64_t values, int32_t threads) {
    int64_t grain = values / (8 * (threads > 0 ? threads : 1));
    if (grain <= GRAIN) return GRAIN;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    LargePages(result, values * (int64_t)sizeof(T)).advise(MADV_HUGEPAGE);
#else
    (void)result;
#endif
    return grain < 1 << 20 ? grain : 1 << 20;
}
