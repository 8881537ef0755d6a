// What the checks of the kernels stand on: random cases, reports, and memory between guard pages.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): equal seeds give equal cases everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15) {}

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t between(int64_t low, int64_t high) {  // both can occur
        return low + (int64_t)(next() % (uint64_t)(high - low + 1));
    }
    bool one_in(int64_t n) { return between(1, n) == 1; }
    float real() {  // in [-1, 1)
        return (float)between(-(1 << 23), (1 << 23) - 1) / (1 << 23);
    }
    template <class T, size_t N>
    T of(const T (&list)[N]) {
        return list[between(0, N - 1)];
    }
    // Around the widths of words, vectors, tiles and pages of rows, or anything.
    int64_t size(int64_t most) {
        static const int64_t near[] = {1,  2,  3,  4,  5,   7,   8,   9,   12,  15,  16,
                                       17, 24, 31, 32, 33,  63,  64,  65,  66,  127, 128,
                                       129, 130, 255, 257, 511, 512, 513, 1023, 1024, 1030};
        int64_t n = one_in(2) ? of(near) : between(1, most);
        return n <= most ? n : between(1, most);
    }

  private:
    uint64_t state;
};

// One random case of one function: what it draws from and where it reports.
class Case {
  public:
    Case(const char* function, const char* isa, uint64_t seed)
        : random(seed), function(function), isa(isa), seed(seed) {
        current = this;
    }
    ~Case() { current = nullptr; }
    Case(const Case&) = delete;

    // Says what the case is, a part at a time, in case it fails.
    __attribute__((format(printf, 2, 3))) void is(const char* format, ...) {
        va_list values;
        va_start(values, format);
        vsnprintf(what + strlen(what), sizeof what - strlen(what), format, values);
        va_end(values);
    }

    __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        if (failed) return;  // the first difference says it all
        failed = true;
        char why[200];
        va_list values;
        va_start(values, format);
        vsnprintf(why, sizeof why, format, values);
        va_end(values);
        if (++failures <= 20)
            printf("FAILED %s %s --seed %llu --cases 1 (%s): %s\n", function, isa,
                   (unsigned long long)seed, what, why);
    }

    // Equal to the last bit: -0 is not 0; but one NaN is as good as another.
    template <class T>
    void same(const char* name, int64_t at, T got, T want) {
        if (memcmp(&got, &want, sizeof got) && (got == got || want == want))
            fail("%s[%lld] is %.9g, wanted %.9g", name, (long long)at, (double)got, (double)want);
    }

    Random random;
    const char *function, *isa;
    uint64_t seed;
    char what[300] = "";
    bool failed = false;

    inline static std::atomic<int64_t> failures{0};
    inline static thread_local const Case* current = nullptr;
};

// Memory with a page on either side that must not be touched.
class Pages {
  public:
    static constexpr int64_t BYTES = 16 << 20;

    static uint8_t* take() {
        std::lock_guard<std::mutex> lock(mutex);
        if (!free.empty()) {
            uint8_t* pages = free.back();
            free.pop_back();
            return pages;
        }
        int64_t page = sysconf(_SC_PAGESIZE);
        void* all = mmap(nullptr, (size_t)(BYTES + 2 * page), PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint8_t* pages = (uint8_t*)all + page;
        if (all == MAP_FAILED || mprotect(pages, (size_t)BYTES, PROT_READ | PROT_WRITE)) abort();
        return pages;
    }
    static void give(uint8_t* pages) {
        std::lock_guard<std::mutex> lock(mutex);
        free.push_back(pages);
    }

  private:
    inline static std::mutex mutex;
    inline static std::vector<uint8_t*> free;
};

enum Place { END, BEGIN, MIDDLE };  // flush with a guard page, or off every wider alignment

// `size` elements at one of these places, with a margin where no guard page is; the margin and
// the elements begin as the same strange bytes.
template <class T>
class Buffer {
  public:
    Buffer(Case& test, const char* name, int64_t size)
        : Buffer(test, name, size, (Place)test.random.between(END, MIDDLE)) {}

    Buffer(Case& test, const char* name, int64_t size, Place place)
        : test(test), name(name), size(size), pages(Pages::take()) {
        int64_t bytes = size * (int64_t)sizeof(T);
        if (size < 0 || bytes > Pages::BYTES - 4 * MARGIN) {
            fprintf(stderr, "%s: %lld bytes do not fit (%s)\n", name, (long long)bytes, test.what);
            abort();
        }
        int64_t start = place == BEGIN ? 0
                        : place == END ? Pages::BYTES - bytes
                                       : (int64_t)sizeof(T) * test.random.between(1, 63);
        begin = pages + start;
        end = begin + bytes;
        low = start < MARGIN ? pages : begin - MARGIN;
        high = pages + Pages::BYTES - end < MARGIN ? pages + Pages::BYTES : end + MARGIN;
        memset(low, STRANGE, (size_t)(high - low));
    }
    ~Buffer() {
        for (const uint8_t* p = low; p < begin; ++p)
            if (*p != STRANGE) test.fail("wrote byte -%lld of %s", (long long)(begin - p), name);
        for (const uint8_t* p = end; p < high; ++p)
            if (*p != STRANGE) test.fail("wrote byte %lld of %s", (long long)(p - begin), name);
        Pages::give(pages);
    }
    Buffer(const Buffer&) = delete;

    T* data() { return (T*)begin; }
    T& operator[](int64_t i) { return data()[i]; }

    // Compares element i with what it must be.
    void must_be(int64_t i, T want) { test.same(name, i, data()[i], want); }

    Case& test;
    const char* name;
    const int64_t size;

  private:
    static constexpr uint8_t STRANGE = 0xa5;
    static constexpr int64_t MARGIN = 256;
    uint8_t *pages, *begin, *end, *low, *high;
};

// A function of the C interface, and a check of one random case of it. A list ends with a null.
// While the checks of the choice run, nothing else may: they change it and put it back.
struct Check {
    const char* function;
    void (*run)(Case&);
};
extern const Check array_checks[], choice_checks[], entropy_checks[];
