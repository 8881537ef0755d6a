// Every function of qkit.h against a loop that can be read off its comment, in fp64 where it
// computes. What the comment gives exactly must come out exactly.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../../kernels/qkit.h"
#include "harness.h"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Mostly small; sometimes enough work to be shared between threads, or for large pages; sometimes
// nothing at all.
struct Matrix {
    int64_t rows, columns;
    int32_t threads;

    explicit Matrix(Random& random) {
        int64_t most = random.one_in(16) ? 200000 : random.one_in(200) ? 2000000 : 3000;
        columns = random.one_in(50) ? 0 : random.size(most < 5000 ? most : 5000);
        rows = random.one_in(50) ? 0 : random.size(columns ? ceil_div(most, columns) : 5);
        if (most > 3000) rows = ceil_div(most, columns ? columns : 1000);
        threads = (int32_t)random.between(1, 4);
    }
};

struct Blocks : Matrix {
    int64_t block, blocks;

    explicit Blocks(Case& test) : Matrix(test.random) {
        block = test.random.size(test.random.one_in(2) ? 64 : columns + 9);
        if (columns && test.random.one_in(4)) block = columns;
        blocks = ceil_div(columns, block);
        test.is("%lld x %lld, block %lld, threads %d", (long long)rows, (long long)columns,
                (long long)block, threads);
    }
    int64_t of(int64_t i) const { return i / columns * blocks + i % columns / block; }
};

float scale_of(Random& random) {
    float scale = std::ldexp(1 + std::fabs(random.real()), (int)random.between(-12, 4));
    return random.one_in(4) ? -scale : scale;
}

// Random zero points, or none.
struct ZeroPoints {
    Buffer<int8_t> values;
    bool affine;

    ZeroPoints(Case& test, int64_t size)
        : values(test, "zero_point", size), affine(test.random.one_in(2)) {
        for (int64_t i = 0; i < size; ++i) values[i] = (int8_t)test.random.between(-128, 127);
        if (!affine) test.is(", symmetric");
    }
    const int8_t* data() { return affine ? values.data() : nullptr; }
    int at(int64_t i) { return affine ? values[i] : 0; }
};

void range(Case& test) {
    Blocks m(test);
    Buffer<float> x(test, "x", m.rows * m.columns);
    Buffer<float> lo(test, "lo", m.rows * m.blocks), hi(test, "hi", m.rows * m.blocks);
    int sign = (int)test.random.between(-1, 1);  // all negative, mixed or all positive
    bool finite = test.random.one_in(2);
    for (int64_t i = 0; i < x.size; ++i) {
        float v = test.random.real();
        x[i] = sign ? (float)sign * std::fabs(v) : v;
        if (test.random.one_in(40)) x[i] = v < 0 ? -0.0f : 3e38f * v;
        if (!finite && test.random.one_in(200))
            x[i] = v < -0.5f ? NAN : v < 0 ? -INFINITY : INFINITY;
    }
    qkit_range(x.data(), m.rows, m.columns, m.block, lo.data(), hi.data(), m.threads);
    std::vector<float> least((size_t)lo.size), greatest((size_t)hi.size);
    for (int64_t i = 0; i < x.size; ++i) {
        size_t b = (size_t)m.of(i);
        if (!std::isfinite(x[i])) least[b] = greatest[b] = NAN;
        if (x[i] < least[b]) least[b] = x[i];
        if (x[i] > greatest[b]) greatest[b] = x[i];
    }
    for (int64_t b = 0; b < lo.size; ++b) {
        lo.must_be(b, least[(size_t)b]);
        hi.must_be(b, greatest[(size_t)b]);
    }
}

void quantize(Case& test) {
    Blocks m(test);
    Buffer<float> x(test, "x", m.rows * m.columns), scale(test, "scale", m.rows * m.blocks);
    Buffer<int8_t> codes(test, "codes", x.size);
    ZeroPoints zero(test, scale.size);
    int32_t qmin = (int32_t)test.random.between(-128, 127);
    int32_t qmax = (int32_t)test.random.between(qmin, 127);
    for (int64_t b = 0; b < scale.size; ++b) scale[b] = scale_of(test.random);
    for (int64_t i = 0; i < x.size; ++i) {
        // Around the range, on the ties, and far away.
        float steps = 300 * test.random.real();
        if (test.random.one_in(4)) steps = std::floor(steps) + 0.5f;
        x[i] = steps * scale[m.of(i)];
        if (test.random.one_in(100)) x[i] = test.random.one_in(2) ? 3e38f * steps : 1e-42f * steps;
    }
    qkit_quantize(x.data(), m.rows, m.columns, m.block, scale.data(), zero.data(), qmin, qmax,
                  codes.data(), m.threads);
    for (int64_t i = 0; i < x.size; ++i) {
        // A quotient that fp64 rounds and fp32 rounds again is the fp32 quotient.
        double steps = std::nearbyint((double)(float)((double)x[i] / scale[m.of(i)]));
        double code = steps + zero.at(m.of(i));
        codes.must_be(i, (int8_t)(code < qmin ? qmin : code > qmax ? qmax : code));
    }
}

// The least normal fp32 number that is at least x.
float above(double x) {
    float y = (float)x;
    if ((double)y < x) y = std::nextafterf(y, INFINITY);
    return std::fmax(y, std::numeric_limits<float>::min());
}

void quantize_minmax(Case& test) {
    Blocks m(test);
    Buffer<float> x(test, "x", m.rows * m.columns), scale(test, "scale", m.rows * m.blocks);
    Buffer<int8_t> codes(test, "codes", x.size), zero(test, "zero_point", scale.size);
    int bits = (int)test.random.between(2, 8);
    bool affine = test.random.one_in(2), narrow = test.random.one_in(2);
    int32_t qmax = (1 << (bits - 1)) - 1, qmin = narrow ? -qmax : -qmax - 1;
    float size = std::fabs(scale_of(test.random));
    bool finite = !test.random.one_in(4);
    for (int64_t i = 0; i < x.size; ++i) {
        x[i] = size * test.random.real();
        if (test.random.one_in(40)) x[i] = test.random.one_in(2) ? 0.0f : 1e-42f * x[i];
        if (!finite && test.random.one_in(30)) x[i] = test.random.one_in(2) ? NAN : -INFINITY;
    }
    std::vector<float> least((size_t)scale.size), greatest((size_t)scale.size);
    bool good = true;
    for (int64_t i = 0; i < x.size; ++i) {
        size_t b = (size_t)m.of(i);
        good &= std::isfinite(x[i]);
        if (x[i] < least[b]) least[b] = x[i];
        if (x[i] > greatest[b]) greatest[b] = x[i];
    }
    int32_t done = qkit_quantize_minmax(x.data(), m.rows, m.columns, m.block, qmin, qmax,
                                        scale.data(), affine ? zero.data() : nullptr, codes.data(),
                                        m.threads);
    if (done != (int32_t)good) test.fail("returned %d, wanted %d", done, (int)good);
    if (!good) return;
    for (int64_t b = 0; b < scale.size; ++b) {
        double lo = least[(size_t)b], hi = greatest[(size_t)b];
        double more = std::fmax(-lo, hi), less = std::fmin(-lo, hi);
        if (affine) {
            float s = above((hi - lo) / (qmax - qmin));
            scale.must_be(b, s);
            double z = qmin - std::nearbyint(lo / s);
            zero.must_be(b, (int8_t)std::fmin(std::fmax(z, qmin), qmax));
        } else if (narrow) {
            scale.must_be(b, above(more / qmax));
        } else {
            float s = above(std::fmax(more / -qmin, less / (qmax + 0.5)));
            scale.must_be(b, hi > -lo ? -s : s);
        }
    }
    for (int64_t i = 0; i < x.size; ++i) {
        int64_t b = m.of(i);
        double code = std::nearbyint((double)(float)((double)x[i] / scale[b]));
        code += affine ? zero[b] : 0;
        codes.must_be(i, (int8_t)(code < qmin ? qmin : code > qmax ? qmax : code));
    }
}

void dequantize(Case& test) {
    Blocks m(test);
    Buffer<int8_t> codes(test, "codes", m.rows * m.columns);
    Buffer<float> x(test, "x", codes.size), scale(test, "scale", m.rows * m.blocks);
    ZeroPoints zero(test, scale.size);
    for (int64_t b = 0; b < scale.size; ++b) scale[b] = scale_of(test.random);
    for (int64_t i = 0; i < codes.size; ++i) codes[i] = (int8_t)test.random.between(-128, 127);
    qkit_dequantize(codes.data(), m.rows, m.columns, m.block, scale.data(), zero.data(), x.data(),
                    m.threads);
    for (int64_t i = 0; i < codes.size; ++i)
        x.must_be(i, (float)((double)(codes[i] - zero.at(m.of(i))) * scale[m.of(i)]));
}

// Rows of `bits`-bit streams, one bit after another.
struct Streams : Matrix {
    int32_t bits, offset;
    int64_t stride;

    explicit Streams(Case& test) : Streams(test, Matrix(test.random)) {}

    Streams(Case& test, const Matrix& matrix) : Matrix(matrix) {
        bits = (int32_t)test.random.between(1, 8);
        offset = test.random.one_in(2) ? 1 << (bits - 1) : 0;
        rows = rows < 200000 ? rows : 200000;
        stride = ceil_div(columns * bits, 8);
        stride += test.random.one_in(2) ? 0 : test.random.one_in(2) ? -stride & 3
                                                                    : test.random.between(1, 20);
        test.is("%lld x %lld, bits %d, stride %lld, threads %d", (long long)rows,
                (long long)columns, bits, (long long)stride, threads);
    }
    uint8_t code(Random& random) const {  // as one byte
        return (uint8_t)(random.between(0, (1 << bits) - 1) - offset);
    }
    void write(uint8_t* stream, const uint8_t* codes) const {
        std::fill(stream, stream + rows * stride, (uint8_t)0);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t bit = 0; bit < columns * bits; ++bit) {
                int value = (codes[r * columns + bit / bits] + offset) >> bit % bits & 1;
                stream[r * stride + bit / 8] |= (uint8_t)(value << bit % 8);
            }
    }
};

void pack(Case& test) {
    Streams m(test);
    test.is(", offset %d", m.offset);
    Buffer<uint8_t> codes(test, "codes", m.rows * m.columns);
    Buffer<uint8_t> stream(test, "stream", m.rows * m.stride);
    for (int64_t i = 0; i < codes.size; ++i) codes[i] = m.code(test.random);
    bool fit = m.bits == 8 || !codes.size || !test.random.one_in(4);
    if (!fit)
        codes[test.random.between(0, codes.size - 1)] =
            (uint8_t)(test.random.between(1 << m.bits, 255) - m.offset);
    int32_t good = qkit_pack(codes.data(), m.rows, m.columns, m.bits, m.offset, stream.data(),
                             m.stride, m.threads);
    if (good != fit) test.fail("returned %d, wanted %d", good, fit);
    if (!fit) return;
    std::vector<uint8_t> want((size_t)stream.size);
    m.write(want.data(), codes.data());
    for (int64_t i = 0; i < stream.size; ++i) stream.must_be(i, want[(size_t)i]);
}

void unpack(Case& test) {
    Streams m(test);
    test.is(", offset %d", m.offset);
    Buffer<uint8_t> stream(test, "stream", m.rows * m.stride);
    Buffer<uint8_t> codes(test, "codes", m.rows * m.columns);
    std::vector<uint8_t> want((size_t)codes.size);
    for (uint8_t& code : want) code = m.code(test.random);
    m.write(stream.data(), want.data());
    qkit_unpack(stream.data(), m.rows, m.columns, m.bits, m.offset, codes.data(), m.stride,
                m.threads);
    for (int64_t i = 0; i < codes.size; ++i) codes.must_be(i, want[(size_t)i]);
}

// The types of x and out, by their number: binary digits, least exponent, greatest value.
struct Format {
    const char* name;
    int digits, least;
    double most;
};
const Format formats[] = {{"fp32", 24, -126, 0x1.fffffep127},
                          {"bf16", 8, -126, 0x1.fep127},
                          {"fp16", 11, -14, 65504}};

// `value` as the nearest of a type, half to even.
double rounded(double value, int type) {
    if (!std::isfinite(value) || value == 0) return value;
    const Format& to = formats[type];
    double step = std::ldexp(1, std::max(std::ilogb(value), to.least) - to.digits + 1);
    double result = std::nearbyint(value / step) * step;
    return std::fabs(result) > to.most ? std::copysign(INFINITY, value) : result;
}

// A buffer of one of the types, read and written as fp64.
class Values {
  public:
    Values(Case& test, const char* name, int64_t size, int32_t type)
        : size(size),
          type(type),
          wide(test, name, type ? 0 : size),
          narrow(test, name, type ? size : 0) {}

    // From element i on.
    void* at(int64_t i) { return type ? (void*)(narrow.data() + i) : (void*)(wide.data() + i); }

    double operator[](int64_t i) {
        if (type == 0) return wide[i];
        uint32_t bits = narrow[i];
        if (type == 1) {
            bits <<= 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            return value;
        }
        int exponent = bits >> 10 & 31, rest = bits & 1023;
        double value = exponent == 31 ? (rest ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024 + rest, exponent - 25)
                                      : std::ldexp(rest, -24);
        return bits >> 15 ? -value : value;
    }
    void set(int64_t i, double value) {
        value = rounded(value, type);
        float single = (float)value;
        if (type == 0) {
            wide[i] = single;
            return;
        }
        uint32_t bits;
        memcpy(&bits, &single, sizeof bits);
        if (type == 2) {
            double size = std::fabs(value);
            uint32_t half = std::isnan(value) ? 0x7e00
                            : std::isinf(value)
                                ? 0x7c00
                            : size < 0x1p-14
                                ? (uint32_t)(size * 0x1p24)
                                : (uint32_t)(std::ilogb(size) + 14) * 1024 +
                                      (uint32_t)std::ldexp(size, 10 - std::ilogb(size));
            bits = (bits >> 31 << 15 | half) << 16;
        }
        narrow[i] = (uint16_t)(bits >> 16);
    }

    const int64_t size;
    const int32_t type;

  private:
    Buffer<float> wide;
    Buffer<uint16_t> narrow;
};

// A stored weight of `n` rows. In fp64: its values; |code| + |zero_point| (or |level|), and that
// times |scale|.
struct Stored {
    Streams m;
    bool book;
    int64_t block, blocks;
    int32_t shared;
    Buffer<uint8_t> stream;
    Buffer<float> scale, levels;
    ZeroPoints zero;
    std::vector<double> value, reach, size;

    Stored(Case& test, const Streams& streams, bool may_have_levels)
        : m(streams),
          book(may_have_levels && test.random.one_in(3)),
          block(block_of(test.random, m.columns)),
          blocks(block ? ceil_div(m.columns, block) : 1),
          shared(test.random.one_in(4)),
          stream(test, "weight", m.rows * m.stride),
          scale(test, "scale", shared ? blocks : m.rows * blocks),
          levels(test, "levels", book ? 1 << m.bits : 0),
          zero(test, scale.size) {
        m.offset = m.bits < 8 && !book ? 1 << (m.bits - 1) : 0;
        std::vector<uint8_t> codes((size_t)(m.rows * m.columns));
        for (uint8_t& code : codes) code = m.code(test.random);
        m.write(stream.data(), codes.data());
        for (int64_t b = 0; b < scale.size; ++b) scale[b] = scale_of(test.random);
        for (int64_t i = 0; i < levels.size; ++i) levels[i] = test.random.real();
        for (int64_t i = 0; i < (int64_t)codes.size(); ++i) {
            int64_t b = (shared ? 0 : i / m.columns * blocks) +
                        (block ? i % m.columns / block : 0);
            uint8_t code = codes[(size_t)i];
            double integer = book ? levels[code] : (int8_t)code - zero.at(b);
            value.push_back(integer * scale[b]);
            reach.push_back(book ? std::fabs(integer)
                                 : std::abs((int8_t)code) + std::abs(zero.at(b)));
            size.push_back(reach.back() * std::fabs(scale[b]));
        }
        test.is(", block %lld%s%s", (long long)block, shared ? ", shared" : "",
                book ? ", levels" : "");
    }
    qkit_weight weight(const float* bias = nullptr) {
        return {stream.data(), m.rows, m.columns,    m.stride,
                block,         m.bits, shared,       scale.data(),
                book ? nullptr : zero.data(), book ? levels.data() : nullptr, bias};
    }

  private:
    // Of whole words and vectors, and of no such thing; longer than the row; none.
    static int64_t block_of(Random& random, int64_t columns) {
        static const int64_t list[] = {0, 1, 5, 6, 7, 8, 12, 16, 32, 64, 128, 256, 512, 640};
        if (random.one_in(12)) return columns + random.between(1, 9);
        return random.one_in(4) ? random.size(1100) : random.of(list);
    }
};

void decode(Case& test) {
    Streams m(test);
    Stored w(test, m, true);
    int32_t type = (int32_t)test.random.between(0, 2);
    bool all = !m.rows || test.random.one_in(2);
    int64_t count = all ? test.random.between(0, m.rows) : test.random.between(0, 2 * m.rows);
    Buffer<int64_t> index(test, "index", all ? 0 : count);
    for (int64_t i = 0; i < index.size; ++i) index[i] = test.random.between(0, m.rows - 1);
    test.is(", %s %lld as %s", all ? "first" : "any", (long long)count, formats[type].name);
    Values out(test, "out", count * m.columns, type);
    const qkit_weight weight = w.weight();
    if (qkit_decode(&weight, all ? nullptr : index.data(), count, type, out.at(0), m.threads))
        test.fail("no memory");
    for (int64_t i = 0; i < out.size; ++i) {
        int64_t row = all ? i / m.columns : index[i / m.columns];
        double value = w.value[(size_t)(row * m.columns + i % m.columns)];
        test.same("out", i, out[i], rounded(rounded(value, 0), type));
    }
}

// What becomes of activations: `kind` in qkit.h.
enum Kind { EXACT, SYMMETRIC, AFFINE, STATIC };

// Columns that share a scale where exact activations become integers, and values that do not.
constexpr int64_t BLOCK = 512;
constexpr double HUGE_X = 0x1p110;

// A random call of qkit_linear, and what its comment says of the result.
class Linear {
  public:
    Linear(Case& test, Kind kind)
        : test(test),
          kind(kind),
          type((int32_t)test.random.between(0, 2)),
          w(test, Streams(test, shape(test.random)), kind == EXACT),
          n(w.m.rows),
          columns(w.m.columns),
          rows(rows_of(test.random, n * columns)),
          x(test, "x", rows * columns, type),
          bias(test, "bias", n),
          biased(test.random.one_in(2)),
          weight(w.weight(biased ? bias.data() : nullptr)) {
        choose_acts();
        for (int64_t i = 0; i < n; ++i) bias[i] = test.random.real();
        for (int64_t r = 0; r < rows; ++r) fill(r);
        for (int64_t k = 0; k < columns; ++k)
            pieces += k % BLOCK == 0 || (w.block && k % w.block == 0);
        // Of integers under one scale, a whole row is one.
        if (kind != EXACT && (!w.block || w.block >= columns)) pieces = std::min<int64_t>(pieces, 1);
        test.is(", rows %lld, kind %d in [%d, %d], %s%s", (long long)rows, kind, acts.qmin,
                acts.qmax, formats[type].name, biased ? ", bias" : "");
    }

    // The results of `some` rows of x from `first` on.
    void run(int64_t first, int64_t some, Values& out, int32_t threads) {
        if (qkit_linear(&weight, &acts, x.at(first * columns), type, some, out.at(0), threads))
            test.fail("no memory");
    }

    // Every so manieth output lies within its bound.
    void within_bounds(Values& out) {
        int64_t step = 1 + rows * n * columns / 300000;
        Row row;
        for (int64_t i = test.random.between(0, step - 1), r = -1; i < rows * n; i += step) {
            if (r != i / n) row = activations(r = i / n);
            Range range = bounds(row, i % n);
            double got = out[i], low = rounded(range.want - range.bound, type);
            double high = rounded(range.want + range.bound, type);
            bool good = std::isnan(range.want) ? std::isnan(got)
                        : std::isnan(range.bound) || (low <= got && got <= high);
            if (!good)
                test.fail("out[%lld, %lld] is %.9g, wanted %.9g within %.3g", (long long)r,
                          (long long)(i % n), got, range.want, range.bound);
        }
    }

    Case& test;
    const Kind kind;
    const int32_t type;
    Stored w;
    const int64_t n, columns, rows;

  private:
    static Matrix shape(Random& random) {
        static const int64_t many[] = {511, 512, 513, 1023, 1024, 1024 + 33, 4200};
        Matrix m(random);
        m.columns = random.one_in(50) ? 0 : random.one_in(3) ? random.of(many) : random.size(1100);
        m.rows = random.one_in(50) ? 0 : random.size(random.one_in(3) ? 140 : 40);
        return m;
    }
    // Around the rows that are done together; not many by a large weight, for that takes long.
    static int64_t rows_of(Random& random, int64_t values) {
        static const int64_t list[] = {1, 1, 1, 2, 3, 4, 5, 12, 13, 63, 64, 65, 130};
        int64_t rows = random.one_in(50) ? 0 : random.of(list), most = 1 + 1000000 / (1 + values);
        return rows < most ? rows : most;
    }

    void choose_acts() {
        static const int32_t widths[] = {8, 8, 4, 2};
        acts = {kind, 0, 0, 0, 0};
        if (kind == EXACT) return;
        bool narrow = kind == SYMMETRIC || (kind == STATIC && test.random.one_in(2));
        acts.qmax = (1 << (test.random.of(widths) - 1)) - 1;
        acts.qmin = narrow ? -acts.qmax : -acts.qmax - 1;
        if (kind != STATIC) return;
        int exponent = (int)test.random.between(-9, -5);
        acts.scale = std::ldexp(1 + std::fabs(test.random.real()), exponent);
        acts.zero_point = narrow ? 0 : (int32_t)test.random.between(acts.qmin, acts.qmax);
    }

    // Numbers around one, and now and then a row that is out of the ordinary.
    void fill(int64_t r) {
        Random& random = test.random;
        int64_t oddity = random.one_in(3) ? random.between(1, 9) : 0;
        // fp16 has no room for more.
        const int high = (int)random.between(100, 126);
        const int exponents[][3] = {{high, -100, -140}, {high, -100, -130}, {6, -13, -23}};
        int exponent = oddity >= 1 && oddity <= 3 ? exponents[type][oddity - 1] : 0;
        bool zeros = oddity == 4, outlier = oddity == 5, edges = oddity == 6;
        // Where what three bytes can say ends, and a power of two and what is next below it.
        static const float ends[] = {1.0f, 0x1.fdfdfcp0f, 0x1.fdfdfep0f, 0x1.fffffep0f};
        float edge = random.of(ends);
        for (int64_t k = 0; k < columns; ++k) {
            double value = random.real();
            if (edges && random.one_in(2)) value = value < 0 ? -edge : edge;
            if (zeros) value = value < 0 ? -0.0 : 0.0;
            if (outlier) value *= 1e-3;
            x.set(r * columns + k, std::ldexp(value, exponent));
        }
        if (!columns || oddity < 5 || edges) return;
        double huge = type == 2 ? 65504 : 1.5 * 0x1p127, large = type == 2 ? 6e4 : 1e6;
        double odd[] = {large, 0, huge, NAN, INFINITY};
        x.set(r * columns + random.between(0, columns - 1),
              (random.one_in(2) ? -1 : 1) * odd[oddity - 5]);
    }

    // A row of x as it is multiplied: x - shift, and how far x is from what was given.
    struct Row {
        std::vector<double> x, off;
        double shift = 0;
        bool finite = true, huge = false;
    };

    Row activations(int64_t r) {
        Row row;
        double low = 0, high = 0;
        for (int64_t k = 0; k < columns; ++k) {
            double value = x[r * columns + k];
            row.x.push_back(value);
            row.finite &= std::isfinite(value);
            low = value < low ? value : low;
            high = value > high ? value : high;
        }
        double most = std::max(-low, high);
        row.huge = !(most < HUGE_X);
        row.off.assign((size_t)columns, 0);
        if (kind == EXACT) {
            for (int64_t k = 0; k < columns; k += BLOCK) {
                double greatest = 0;
                int64_t end = std::min(columns, k + BLOCK);
                for (int64_t i = k; i < end; ++i)
                    greatest = std::max(greatest, std::fabs(row.x[(size_t)i]));
                double off = type == 1 ? std::max(std::exp2(-14.9) * greatest, 0x1p-119)
                                       : std::max(std::exp2(-22.9) * greatest, 0x1p-127);
                std::fill(row.off.begin() + k, row.off.begin() + end, off);
            }
            return row;
        }
        // As qkit.numerics.affine.
        double scale = acts.scale, zero = acts.zero_point;
        if (kind != STATIC) {
            double exact =
                kind == AFFINE ? (high - low) / (acts.qmax - acts.qmin) : most / acts.qmax;
            float single = (float)exact;
            if (single < exact) single = std::nextafter(single, INFINITY);
            scale = std::max(single, 0x1p-126f);
            zero = kind == AFFINE ? acts.qmin - std::nearbyint(low / scale) : 0;
            zero = std::min(std::max(zero, (double)acts.qmin), (double)acts.qmax);
        }
        row.shift = zero * scale;
        for (double& value : row.x) {
            double q = std::nearbyint((float)(value / scale)) + zero;
            value = scale * std::min(std::max(q, (double)acts.qmin), (double)acts.qmax);
        }
        return row;
    }

    // NaN as a bound: anything may come out.
    struct Range {
        double want, bound;
    };

    Range bounds(const Row& row, int64_t c) {
        double want = biased ? bias[c] : 0, size = std::fabs(want), moved = 0, reach = 0;
        bool exact = kind == EXACT;
        // By which way a set goes is known of all, except of the one that is chosen at first use.
        bool unknown = !strcmp(test.isa, "first use");
        bool digits = exact && !w.book && row.finite && !row.huge &&
                      (unknown || !strcmp(test.isa, "avx512vnni"));
        double floats_size = size;
        for (int64_t k = 0; k < columns; ++k) {
            size_t i = (size_t)k, j = (size_t)(c * columns + k);
            double most = std::fabs(row.x[i]) + (digits ? row.off[i] : 0) + std::fabs(row.shift);
            want += (row.x[i] - row.shift) * w.value[j];
            floats_size += std::fabs(row.x[i] * w.value[j]);
            size += most * w.size[j];
            moved += row.off[i] * std::fabs(w.value[j]);
            reach += most * std::max(w.reach[j], w.size[j]);
        }
        double integers = ((double)pieces + (row.shift != 0 ? 7 : 4)) * 0x1p-24 * size + moved +
                          (double)(2 * pieces + 4) * 0x1p-150;
        double floats = ((double)columns / 4 + 8) * 0x1p-24 * floats_size +
                        (double)columns * 0x1p-150;
        double bound = !exact || (digits && !unknown) ? integers
                       : digits                       ? std::max(integers, floats)
                                                      : floats;
        if (!exact && !row.finite) return {NAN, 0};
        bool overflow = !(exact && !digits ? floats_size < 0x1.ffp127 : reach < 0x1.ffp127);
        return {want, !row.finite ? 0 : overflow ? NAN : bound};
    }

    qkit_acts acts;
    Values x;
    Buffer<float> bias;
    const bool biased;
    qkit_weight weight;
    int64_t pieces = 0;
};

void linear(Case& test) {
    Linear call(test, (Kind)std::max<int64_t>(EXACT, test.random.between(EXACT - 3, STATIC)));
    int64_t n = call.n, rows = call.rows;
    Values out(test, "out", rows * n, call.type);
    call.run(0, rows, out, call.w.m.threads);
    call.within_bounds(out);
    // A row does not depend on those beside it.
    for (int64_t most : {(int64_t)1, rows}) {
        if (!rows) return;
        int64_t some = test.random.between(1, most);
        int64_t first = test.random.between(0, rows - some);
        Values part(test, "some rows", some * n, call.type);
        call.run(first, some, part, (int32_t)test.random.between(1, 4));
        for (int64_t i = 0; i < some * n; ++i)
            test.same("some rows", i, part[i], out[first * n + i]);
    }
}

void keep(Case& test) {
    // Seldom as large as a large page: making one takes a millisecond.
    const int64_t most = test.random.one_in(30) ? 9 << 20 : 5000;
    Buffer<uint8_t> memory(test, "memory", test.random.between(0, most));
    for (int64_t i = 0; i < memory.size; ++i) memory[i] = (uint8_t)(i * 2654435761u >> 13);
    qkit_keep(memory.data(), memory.size);
    for (int64_t i = 0; i < memory.size; ++i) memory.must_be(i, (uint8_t)(i * 2654435761u >> 13));
}

// The integers of activations give the bits of the scalar set, which is the definition of correct.
void use(Case& test) {
    Linear call(test, (Kind)test.random.between(SYMMETRIC, STATIC));
    Values out(test, "out", call.rows * call.n, call.type);
    Values want(test, "scalar's", out.size, call.type);
    call.run(0, call.rows, out, call.w.m.threads);
    const char* scalar = qkit_use("scalar");
    if (!scalar || strcmp(scalar, "scalar")) test.fail("there is no scalar set");
    call.run(0, call.rows, want, call.w.m.threads);
    const char* again = qkit_use(test.isa);
    if (!again || strcmp(again, test.isa)) test.fail("%s cannot be chosen again", test.isa);
    for (int64_t i = 0; i < out.size; ++i) test.same("out", i, out[i], want[i]);
}

}  // namespace

const Check array_checks[] = {
    {"qkit_range", range},   {"qkit_quantize", quantize}, {"qkit_dequantize", dequantize},
    {"qkit_quantize_minmax", quantize_minmax},
    {"qkit_pack", pack},     {"qkit_unpack", unpack},     {"qkit_decode", decode},
    {"qkit_linear", linear}, {"qkit_keep", keep},         {nullptr, nullptr},
};
const Check choice_checks[] = {{"qkit_use", use}, {nullptr, nullptr}};
