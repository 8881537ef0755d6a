// A linear layer with a stored weight: the way it is computed, its scratch memory, its C interface.
#include <cstdlib>

#include "pool.h"
#include "qkit.h"
#include "table.h"

namespace {

// Scratch memory of a thread that calls: kept, because making pages costs more than most calls.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    // Begin anew, with room for `bytes`; false if there is no memory.
    bool reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        std::free(memory_);
        size_ = (bytes + 4095) / 4096 * 4096;
        memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
        if (!memory_) size_ = 0;
        return memory_ != nullptr;
    }

    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(memory_ + used_);
        used_ += room<T>(count);
        return at;
    }

    template <class T>
    static size_t room(int64_t count) {
        return ((size_t)count * sizeof(T) + 63) / 64 * 64;
    }

private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

Weight stored(const qkit_weight& w) {
    int64_t block = w.block > 0 && w.block < w.columns ? w.block : w.columns > 0 ? w.columns : 1;
    int64_t blocks = w.shared ? 0 : (w.columns + block - 1) / block;
    return {w.codes, w.columns, w.stride,     block,   blocks,
            w.bits,  w.scale,   w.zero_point, w.levels};
}

int64_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most how many pieces `plan` makes.
int64_t most_pieces(const Weight& w) {
    return ceil_div(w.columns, w.block) + ceil_div(w.columns, BLOCK);
}

// Whether so few rows go without a tile: measured, it pays where sums are brought together seldom.
bool streamed(const Weight& w, int64_t rows, int32_t limbs, bool whole) {
    if (whole) return w.bits > 1 && rows <= (w.columns < LONG ? STREAMED : CROSSED);
    bool parts = w.block < w.columns && w.block * w.bits < 64 * 8;
    return w.bits > 1 && rows * limbs <= (rows == 1 ? 3 : parts ? 0 : STREAMED);
}

Plan plan(const Weight& w, bool stream, bool whole, Piece* pieces, int64_t* first_piece) {
    Plan p{&w, pieces, first_piece, 0, ceil_div(w.columns, BLOCK), 0, false, false, false, whole, 1};
    p.flat = w.block >= w.columns;
    // Bytes and what divides them evenly are used as they lie, if groups begin at whole units.
    int32_t pack = 8 % w.bits == 0 ? 8 / w.bits : 0;
    p.direct = pack && (p.flat || w.block % (4 * pack) == 0);
    if (p.direct) p.pack = pack;
    // A streamed piece begins at a vector of 64 bytes, or is a half or a quarter of one.
    int64_t bits = w.block * w.bits, unit = 4 * p.pack;
    bool parts = !p.flat && (bits == 16 * 8 || bits == 32 * 8);
    p.stream = stream && p.direct &&
               (p.flat || (BLOCK % w.block == 0 && (parts || bits % (64 * 8) == 0)));
    if (p.stream && !parts) unit = 64 * p.pack;
    for (int64_t b = 0; b < p.blocks; ++b) {
        first_piece[b] = p.count;
        int64_t end = (b + 1) * BLOCK < w.columns ? (b + 1) * BLOCK : w.columns;
        for (int64_t k = b * BLOCK, last; k < end; k = last) {
            last = (k / w.block + 1) * w.block;
            last = last < end ? last : end;
            int64_t steps = ceil_div(last - k, unit) * (unit / 4);
            pieces[p.count++] = {k, last, p.steps, steps, k / w.block};
            p.steps += steps;
        }
    }
    first_piece[p.blocks] = p.count;
    return p;
}

// By floats: a chunk of rows of x, widened, meets tiles of the weight decoded to fp32.
struct Floats {
    float *x, *out, *arranged;

    static size_t room(const Table& use, const Weight& w, int64_t rows, int64_t n) {
        int64_t length = ceil_div(w.columns, use.lanes) * use.lanes;
        return Scratch::room<float>(rows * w.columns) + Scratch::room<float>(rows * n) +
               Scratch::room<float>(rows * length);
    }
    Floats(const Table& use, const Weight& w, int64_t rows, int64_t n)
        : x(scratch.take<float>(rows * w.columns)),
          out(scratch.take<float>(rows * n)),
          arranged(scratch.take<float>(rows * (ceil_div(w.columns, use.lanes) * use.lanes))) {}

    void run(const Table& use, const Weight& w, int64_t n, const float* bias, const void* from,
             Type type, int64_t rows, void* to, int32_t threads) {
        bool wide = type == FLOAT32;
        if (!wide) use.widen(from, type, rows * w.columns, x);
        use.arrange(wide ? static_cast<const float*>(from) : x, rows, w.columns, arranged);
        float* result = wide ? static_cast<float*>(to) : out;
        // A decoded value costs about as much as four rows that meet it.
        int64_t cost = use.strip * w.columns * (rows + 3) / 4;
        parallel(ceil_div(n, use.strip), cost, threads, [&](int64_t first, int64_t last) {
            last = last * use.strip < n ? last * use.strip : n;
            use.linear(arranged, rows, w, bias, result, n, first * use.strip, last);
        });
        if (!wide) use.narrow(out, type, rows * n, to);
    }
};

// Room for the integers of a chunk of rows of x.
size_t integers_room(const Weight& w, int64_t rows, int32_t limbs) {
    int64_t blocks = ceil_div(w.columns, BLOCK), count = most_pieces(w);
    // Each piece may be filled up, by less than a unit of 512 columns, and the end to a vector.
    int64_t codes = w.columns + 512 * count;
    return Scratch::room<Piece>(count) + Scratch::room<int64_t>(blocks + 1) +
           Scratch::room<int8_t>(rows * (codes + 512) * limbs) +
           Scratch::room<int32_t>(rows * count * limbs + 16) +
           Scratch::room<float>(rows * count) +
           Scratch::room<float>(rows * count + 16) + Scratch::room<float>(rows) +
           Scratch::room<float>(rows * w.columns) + Scratch::room<uint8_t>(rows);
}

// Rows of x that are worth a pass over the weight of their own.
constexpr int64_t WORTH = 32;

// Into how many runs of rows a call is split, so that each thread does whole runs, from the digits
// to the results, and waits for no other; 1 if they would be so short that it is better to share
// the weight's rows.
int64_t runs(int64_t rows, int64_t most, int32_t threads) {
    if (threads <= 1 || rows < threads * WORTH) return 1;
    int64_t runs = ceil_div(ceil_div(rows, most), threads) * threads;
    return rows >= runs * WORTH ? runs : 1;
}

int32_t linear(const qkit_weight* weight, const qkit_acts* how, const void* x, int32_t dtype,
               int64_t rows, void* out, int32_t threads) {
    const Table& use = table();
    const Weight w = stored(*weight);
    const Acts acts = {(Kind)how->kind, how->qmin, how->qmax, how->scale, how->zero_point};
    const Type type = (Type)dtype;
    const int64_t n = weight->n, row_bytes = w.columns * bytes_of(dtype);
    if (rows <= 0 || n <= 0) return 0;
    const bool exact = acts.kind == EXACT, by_floats = exact && (!use.exact || w.levels);
    const bool affine = acts.kind == AFFINE || acts.kind == STATIC;
    const int32_t limbs = !exact ? 1 : type == BFLOAT16 ? 2 : 3;
    const int64_t chunk = limbs == 1 ? MOST_ROWS : ROWS, most = rows < chunk ? rows : chunk;
    size_t room = by_floats ? 0 : integers_room(w, most + affine, limbs);
    if (exact) room += Floats::room(use, w, most, n);
    if (!scratch.reserve(room)) return 1;
    if (by_floats) {
        Floats floats(use, w, most, n);
        for (int64_t r = 0; r < rows; r += ROWS) {
            int64_t some = rows - r < ROWS ? rows - r : ROWS;
            floats.run(use, w, n, weight->bias, (const char*)x + r * row_bytes, type, some,
                       (char*)out + r * n * bytes_of(dtype), threads);
        }
        return 0;
    }
    int64_t blocks = ceil_div(w.columns, BLOCK), count = most_pieces(w);
    Piece* pieces = scratch.take<Piece>(count);
    int64_t* first_piece = scratch.take<int64_t>(blocks + 1);
    const bool whole = !exact && w.columns > 0 && w.block >= w.columns && w.columns <= WHOLE;
    const bool stream = use.streams && (whole || !affine) && streamed(w, rows, limbs, whole);
    const Plan p = plan(w, stream, whole, pieces, first_piece);
    Digits d{};
    d.limbs = limbs;
    const int64_t all = most + affine;
    d.stride = (p.steps * 4 + 511) / 512 * 512;
    d.codes = scratch.take<int8_t>(all * d.stride * limbs);
    d.start = scratch.take<int32_t>(all * p.count * limbs + 16);
    d.sum = scratch.take<float>(all * p.count);
    d.scale = scratch.take<float>(all * (p.stream ? p.count : p.blocks) + 16);
    float* shift = scratch.take<float>(all);
    float* wide = scratch.take<float>(most * w.columns);
    uint8_t* good = scratch.take<uint8_t>(most);
    Floats alone(use, w, exact ? 1 : 0, n);  // for rows that have no digits, one after the other
    if (affine) d.shift = shift;
    for (int64_t r = 0; r < rows; r += chunk) {
        int64_t some = rows - r < chunk ? rows - r : chunk;
        const char* from = (const char*)x + r * row_bytes;
        d.rows = some + affine;
        // Groups of about the same size: the sums of a small one wait for themselves.
        d.group = ceil_div(d.rows, ceil_div(d.rows, use.meets / limbs));
        parallel(some, w.columns * 2, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const float* row = reinterpret_cast<const float*>(from) + i * w.columns;
                if (type != FLOAT32) {
                    use.widen(from + i * row_bytes, type, w.columns, wide + i * w.columns);
                    row = wide + i * w.columns;
                }
                good[i] = use.digits(p, acts, row, i, d);
            }
        });
        if (affine) use.ones(p, some, d);
        Output to = {(char*)out + r * n * bytes_of(dtype), type, n, weight->bias};
        int64_t cost = use.tile * w.columns * (some * limbs + 8) / 16;
        parallel(ceil_div(n, use.tile), cost, threads, [&](int64_t first, int64_t last) {
            last = last * use.tile < n ? last * use.tile : n;
            use.integer(p, d, to, first * use.tile, last);
        });
        for (int64_t i = 0; i < some; ++i) {
            if (good[i]) continue;
            // Infinity and NaN have no digits. Exact activations go by floats, row by row; an
            // integer could only hide them.
            char* at = (char*)to.data + i * n * bytes_of(dtype);
            if (exact) {
                alone.run(use, w, n, weight->bias, from + i * row_bytes, type, 1, at, threads);
            } else {
                const float nan = __builtin_nanf("");
                for (int64_t c = 0; c < n; ++c) use.narrow(&nan, type, 1, at + c * bytes_of(dtype));
            }
        }
    }
    return 0;
}

}  // namespace

QKIT_API int32_t qkit_linear(const qkit_weight* weight, const qkit_acts* how, const void* x,
                             int32_t dtype, int64_t rows, void* out, int32_t threads) {
    const int64_t most = how->kind == EXACT ? ROWS : MOST_ROWS;
    const int64_t split = runs(rows, most, threads), run = ceil_div(rows, split);
    if (split <= 1) return linear(weight, how, x, dtype, rows, out, threads);
    const int64_t given = weight->columns * bytes_of(dtype), made = weight->n * bytes_of(dtype);
    const int64_t cost = run * weight->columns * weight->n / 16;
    std::atomic<int32_t> failed{0};
    parallel(split, cost, threads, [&](int64_t first, int64_t last) {
        first *= run;
        last = last * run < rows ? last * run : rows;
        if (first < last && linear(weight, how, (const char*)x + first * given, dtype,
                                   last - first, (char*)out + first * made, 1))
            failed = 1;
    });
    return failed;
}

QKIT_API int32_t qkit_decode(const qkit_weight* weight, const int64_t* index, int64_t count,
                             int32_t dtype, void* out, int32_t threads) {
    const Table& use = table();
    const Weight w = stored(*weight);
    const Type type = (Type)dtype;
    const int64_t bytes = w.columns * bytes_of(dtype);
    auto body = [&](int64_t first, int64_t last) {
        float part[BLOCK];
        for (int64_t r = first; r < last; ++r) {
            int64_t row = index ? index[r] : r;
            char* to = (char*)out + r * bytes;
            if (type == FLOAT32) {
                use.decode(w, row, 0, w.columns, reinterpret_cast<float*>(to));
                continue;
            }
            for (int64_t k = 0; k < w.columns; k += BLOCK) {
                int64_t end = w.columns - k < BLOCK ? w.columns : k + BLOCK;
                use.decode(w, row, k, end, part);
                use.narrow(part, type, end - k, to + k * bytes_of(dtype));
            }
        }
    };
    int64_t grain = large(static_cast<char*>(out), count * bytes, threads);
    parallel(count, w.columns, threads, body, grain);
    return 0;
}
