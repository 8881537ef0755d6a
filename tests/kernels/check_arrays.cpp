// Every function of qkit.h against a loop that can be read off its comment, in fp64 where it
// computes. What the comment gives exactly must come out exactly.
#include <algorithm>
#include <cmath>

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

    explicit Streams(Case& test, int64_t most_rows = INT64_MAX) : Matrix(test.random) {
        rows = rows < most_rows ? rows : most_rows;
        bits = (int32_t)test.random.between(1, 8);
        offset = test.random.one_in(2) ? 1 << (bits - 1) : 0;
        rows = rows < 200000 ? rows : 200000;
        stride = ceil_div(columns * bits, 8);
        stride += test.random.one_in(2) ? 0 : test.random.one_in(2) ? -stride & 3
                                                                    : test.random.between(1, 20);
        test.is("%lld x %lld, bits %d, offset %d, stride %lld, threads %d", (long long)rows,
                (long long)columns, bits, offset, (long long)stride, threads);
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
    Buffer<uint8_t> stream(test, "stream", m.rows * m.stride);
    Buffer<uint8_t> codes(test, "codes", m.rows * m.columns);
    std::vector<uint8_t> want((size_t)codes.size);
    for (uint8_t& code : want) code = m.code(test.random);
    m.write(stream.data(), want.data());
    qkit_unpack(stream.data(), m.rows, m.columns, m.bits, m.offset, codes.data(), m.stride,
                m.threads);
    for (int64_t i = 0; i < codes.size; ++i) codes.must_be(i, want[(size_t)i]);
}

// A stored weight of `n` rows, and its values in fp64.
struct Stored {
    Streams m;
    int64_t block, blocks;
    int32_t shared;
    Buffer<uint8_t> stream;
    Buffer<float> scale;
    ZeroPoints zero;
    std::vector<double> value;

    Stored(Case& test, int64_t most_rows)
        : m(test, most_rows),
          block(test.random.one_in(4) ? 0 : test.random.size(test.random.one_in(2) ? 64 : 1100)),
          blocks(block ? ceil_div(m.columns, block) : 1),
          shared(test.random.one_in(4)),
          stream(test, "weight", m.rows * m.stride),
          scale(test, "scale", shared ? blocks : m.rows * blocks),
          zero(test, scale.size) {
        m.offset = m.bits < 8 ? 1 << (m.bits - 1) : 0;
        std::vector<uint8_t> codes((size_t)(m.rows * m.columns));
        for (uint8_t& code : codes) code = m.code(test.random);
        m.write(stream.data(), codes.data());
        for (int64_t b = 0; b < scale.size; ++b) scale[b] = scale_of(test.random);
        for (int64_t i = 0; i < (int64_t)codes.size(); ++i) {
            int64_t b = (shared ? 0 : i / m.columns * blocks) +
                        (block ? i % m.columns / block : 0);
            value.push_back((double)((int8_t)codes[(size_t)i] - zero.at(b)) * scale[b]);
        }
        test.is(", block %lld%s", (long long)block, shared ? ", shared" : "");
    }
};

void decode(Case& test) {
    Stored w(test, INT64_MAX);
    Buffer<float> x(test, "x", w.m.rows * w.m.columns);
    qkit_decode(w.stream.data(), w.m.rows, w.m.columns, w.m.stride, w.m.bits, w.block,
                w.scale.data(), w.zero.data(), w.shared, x.data(), w.m.threads);
    for (int64_t i = 0; i < x.size; ++i) x.must_be(i, (float)w.value[(size_t)i]);
}

void linear(Case& test) {
    Stored w(test, 200);
    int64_t n = w.m.rows, columns = w.m.columns;
    int64_t rows = test.random.one_in(50) ? 0 : test.random.size(test.random.one_in(4) ? 140 : 9);
    int64_t most = 1 + 3000000 / (1 + n * columns);  // the loop below is slow
    rows = rows < most ? rows : most;
    test.is(", rows %lld", (long long)rows);
    Buffer<float> x(test, "x", rows * columns), bias(test, "bias", n), out(test, "out", rows * n);
    const float* maybe = test.random.one_in(2) ? bias.data() : nullptr;
    for (int64_t i = 0; i < n; ++i) bias[i] = test.random.real();
    for (int64_t i = 0; i < x.size; ++i) x[i] = test.random.real();
    // What is not a number must stay in its own row.
    for (int64_t r = 0; r < rows && columns; ++r)
        if (test.random.one_in(20))
            x[r * columns + test.random.between(0, columns - 1)] = r % 2 ? NAN : INFINITY;
    auto run = [&](const float* from, int64_t some, float* to, int32_t threads) {
        Buffer<float> scratch(test, "scratch", qkit_linear_scratch(some, columns));
        qkit_linear(from, some, w.stream.data(), n, columns, w.m.stride, w.m.bits, w.block,
                    w.scale.data(), w.zero.data(), w.shared, maybe, to, scratch.data(), threads);
    };
    run(x.data(), rows, out.data(), w.m.threads);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c) {
            double want = maybe ? bias[c] : 0, size = std::fabs(want);
            for (int64_t k = 0; k < columns; ++k) {
                double product = x[r * columns + k] * w.value[(size_t)(c * columns + k)];
                want += product;
                size += std::fabs(product);
            }
            double got = out[r * n + c], bound = ((double)columns / 4 + 8) * 0x1p-24 * size;
            bool good = std::isnan(want)   ? std::isnan(got)
                        : std::isinf(want) ? got == want
                                           : std::fabs(got - want) <= bound;
            if (!good)
                test.fail("out[%lld, %lld] is %.9g, wanted %.9g within %.3g", (long long)r,
                          (long long)c, got, want, bound);
        }
    if (!rows) return;
    int64_t r = test.random.between(0, rows - 1);
    Buffer<float> alone(test, "a row alone", n);
    run(x.data() + r * columns, 1, alone.data(), 1);
    for (int64_t c = 0; c < n; ++c)
        alone.must_be(c, out[r * n + c]);
}

}  // namespace

const Check array_checks[] = {
    {"qkit_range", range},   {"qkit_quantize", quantize}, {"qkit_dequantize", dequantize},
    {"qkit_pack", pack},     {"qkit_unpack", unpack},     {"qkit_decode", decode},
    {"qkit_linear", linear}, {nullptr, nullptr},
};
