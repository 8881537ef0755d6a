// The entropy coders of entropy.h: what is encoded comes back, and nothing that a file can hold
// makes a decoder touch other memory. Their bits are those of the Python coders, and the Python
// tests compare the two.
#include "../../kernels/entropy.h"

#include <utility>

#include "harness.h"

namespace {

// The same functions of either coder, with its table inside.
struct Coder {
    uint8_t lengths[256] = {0};
    uint16_t frequencies[256] = {0};
    uint32_t bits = 0;  // of the frequencies; 0 for Huffman
    std::vector<uint8_t> alphabet;

    void add(uint8_t symbol, uint32_t length) {
        lengths[symbol] = (uint8_t)length;
        alphabet.push_back(symbol);
    }

    // A random complete prefix code: leaves are split until there are enough.
    static Coder huffman(Random& random) {
        Coder coder;
        std::vector<uint32_t> depths = {random.one_in(10) ? 1u : 0u};
        int64_t wanted = depths[0] ? 1 : random.size(256);
        for (int tries = 0; (int64_t)depths.size() < wanted || !depths[0]; ++tries) {
            // The newest leaf now and then, so that long codes occur.
            size_t i = random.one_in(3) ? depths.size() - 1
                                        : (size_t)random.between(0, (int64_t)depths.size() - 1);
            if (tries > 4000) break;
            if (depths[i] < 12) depths.push_back(++depths[i]);
        }
        uint8_t first = (uint8_t)random.next(), step = (uint8_t)(random.next() | 1);
        for (size_t i = 0; i < depths.size(); ++i)
            coder.add((uint8_t)(first + i * step), depths[i]);
        return coder;
    }

    static Coder ans(Random& random) {
        Coder coder;
        coder.bits = (uint32_t)random.between(12, 15);
        uint32_t left = 1u << coder.bits;
        uint8_t first = (uint8_t)random.next(), step = (uint8_t)(random.next() | 1);
        uint32_t symbols = (uint32_t)random.size(256);
        for (uint32_t i = 0; i < symbols; ++i) {
            uint32_t most = left - (symbols - 1 - i);  // one at least for each of the others
            uint32_t f = i + 1 == symbols   ? left
                         : random.one_in(2) ? (uint32_t)random.between(1, most)
                                            : (uint32_t)random.between(1, most / 64 + 1);
            uint8_t symbol = (uint8_t)(first + i * step);
            coder.frequencies[symbol] = (uint16_t)f;
            coder.alphabet.push_back(symbol);
            left -= f;
        }
        return coder;
    }

    int32_t encode(uint32_t lanes, uint64_t block, const uint8_t* symbols, uint64_t count,
                   uint64_t first, uint64_t last, uint8_t* out, uint64_t stride,
                   uint64_t* sizes) const {
        return bits ? qkit_ans_encode(frequencies, bits, lanes, block, symbols, count, first, last,
                                      out, stride, sizes)
                    : qkit_huffman_encode(lengths, lanes, block, symbols, count, first, last, out,
                                          stride, sizes);
    }
    int32_t decode(uint32_t lanes, uint64_t block, const uint8_t* payload, uint64_t bytes,
                   const uint64_t* offsets, uint64_t first, uint64_t last, uint8_t* out,
                   uint64_t count) const {
        return bits ? qkit_ans_decode(frequencies, bits, lanes, block, payload, bytes, offsets,
                                      first, last, out, count)
                    : qkit_huffman_decode(lengths, lanes, block, payload, bytes, offsets, first,
                                          last, out, count);
    }
};

void returned(Case& test, const char* call, int32_t got, int32_t want) {
    if (got != want) test.fail("%s returned %d, wanted %d", call, got, want);
}

void corrupt(Case& test, const Coder& good, uint32_t lanes, uint64_t block, uint64_t count,
             Buffer<uint8_t>& payload, Buffer<uint64_t>& offsets) {
    Random& random = test.random;
    uint64_t blocks = (uint64_t)offsets.size - 1;
    Buffer<uint8_t> out(test, "out of what is corrupt", (int64_t)count);
    for (int tries = 0; tries < 8; ++tries) {
        Coder coder = good;
        // Shorter, so that the end of the payload is again the end of what may be read.
        int64_t cut = random.one_in(3) ? random.between(0, payload.size) : 0;
        Buffer<uint8_t> bytes(test, "corrupt payload", payload.size - cut);
        Buffer<uint64_t> at(test, "corrupt offsets", offsets.size);
        memcpy(bytes.data(), payload.data(), (size_t)bytes.size);
        memcpy(at.data(), offsets.data(), (size_t)at.size * sizeof(uint64_t));
        if (cut && random.one_in(2))  // and the offsets agree with it
            for (int64_t b = 0; b < at.size; ++b)
                if (at[b] > (uint64_t)bytes.size) at[b] = (uint64_t)bytes.size;
        for (int64_t flips = random.between(0, 6); flips-- && bytes.size;)
            bytes[random.between(0, bytes.size - 1)] ^= (uint8_t)(1u << random.between(0, 7));
        if (random.one_in(4))
            at[random.between(0, at.size - 1)] = random.next() >> random.between(0, 63);
        if (random.one_in(4)) coder.lengths[random.next() & 255] = (uint8_t)(random.next() & 15);
        if (random.one_in(4))
            coder.frequencies[random.next() & 255] ^= (uint16_t)(random.next() & 3);
        if (random.one_in(20))
            for (int64_t i = 0; i < bytes.size; ++i) bytes[i] = (uint8_t)random.next();
        int32_t status = coder.decode(lanes, block, bytes.data(), (uint64_t)bytes.size, at.data(),
                                      0, blocks, out.data(), count);
        if (status < QKIT_ENTROPY_OK || status > QKIT_ENTROPY_STREAM)
            test.fail("decoding what is corrupt returned %d", status);
        // A block that has lost its last bytes cannot be whole.
        if (bytes.size < payload.size && status == QKIT_ENTROPY_OK)
            test.fail("a payload without its last %lld bytes was decoded", (long long)cut);
    }
}

// The last stream of the last block has some bytes more or less than it needs, and says so.
void resized(Case& test, const Coder& coder, uint32_t lanes, uint64_t block, uint64_t count,
             Buffer<uint8_t>& payload, Buffer<uint64_t>& offsets) {
    Random& random = test.random;
    int64_t blocks = offsets.size - 1;
    if (!blocks) return;
    int64_t begin = (int64_t)offsets[blocks - 1], at = begin + 2 * ((int64_t)lanes - 1);
    int64_t bytes = coder.bits ? payload.size - begin - 4 * (int64_t)lanes
                               : payload[at] | payload[at + 1] << 8;
    int64_t change = random.one_in(2) ? random.between(1, 12) : -random.between(0, bytes);
    if (!change) return;
    Buffer<uint8_t> other(test, "resized payload", payload.size + change);
    for (int64_t i = 0; i < other.size; ++i)
        other[i] = i < payload.size ? payload[i] : (uint8_t)random.next();
    if (!coder.bits) {
        other[at] = (uint8_t)(bytes + change);
        other[at + 1] = (uint8_t)((bytes + change) >> 8);
    }
    offsets[blocks] += (uint64_t)change;
    Buffer<uint8_t> out(test, "out of what is resized", (int64_t)count);
    returned(test, "decoding a stream of another length",
             coder.decode(lanes, block, other.data(), (uint64_t)other.size, offsets.data(), 0,
                          (uint64_t)blocks, out.data(), count),
             QKIT_ENTROPY_STREAM);
    offsets[blocks] -= (uint64_t)change;
}

void refused(Case& test, const Coder& good, uint32_t lanes, uint64_t block, uint64_t count,
             Buffer<uint8_t>& symbols, Buffer<uint8_t>& out, uint64_t stride,
             Buffer<uint64_t>& sizes, uint64_t blocks) {
    auto encode = [&](const Coder& coder, uint32_t some, uint64_t width, uint64_t last) {
        return coder.encode(some, block, symbols.data(), count, 0, last, out.data(), width,
                            sizes.data());
    };
    returned(test, "encoding in no lanes", encode(good, 0, stride, blocks), QKIT_ENTROPY_ARGUMENT);
    returned(test, "encoding in 33 lanes", encode(good, 33, stride, blocks), QKIT_ENTROPY_ARGUMENT);
    returned(test, "encoding too many blocks", encode(good, lanes, stride, blocks + 1),
             QKIT_ENTROPY_ARGUMENT);
    returned(test, "encoding to too little room",
             encode(good, lanes, qkit_entropy_bound(block, lanes) - 1, blocks),
             QKIT_ENTROPY_ARGUMENT);
    Coder coder = good;
    coder.lengths[good.alphabet[0]] += 1;
    coder.frequencies[good.alphabet[0]] ^= 1;
    returned(test, "encoding with a wrong table", encode(coder, lanes, stride, blocks),
             QKIT_ENTROPY_TABLE);
    if (good.alphabet.size() == 256 || !count) return;
    uint8_t stranger = 0;
    while (good.lengths[stranger] || good.frequencies[stranger]) ++stranger;
    symbols[test.random.between(0, symbols.size - 1)] = stranger;
    returned(test, "encoding a symbol without a code", encode(good, lanes, stride, blocks),
             QKIT_ENTROPY_ARGUMENT);
}

void round_trip(Case& test, const Coder& coder) {
    Random& random = test.random;
    uint32_t lanes = random.one_in(3) ? 32 : (uint32_t)random.between(1, 32);
    uint64_t block = (uint64_t)random.size(2000);
    uint64_t count = random.one_in(30) ? 0 : (uint64_t)random.size(6 * (int64_t)block);
    if (count > 4000) count = 4000;
    uint64_t blocks = (count + block - 1) / block;
    uint64_t stride = qkit_entropy_bound(block, lanes) + (uint64_t)random.between(0, 9);
    test.is("%llu symbols of %zu, blocks of %llu, %u lanes, bits %u", (unsigned long long)count,
            coder.alphabet.size(), (unsigned long long)block, lanes, coder.bits);

    Buffer<uint8_t> symbols(test, "symbols", (int64_t)count);
    Buffer<uint8_t> out(test, "out", (int64_t)(blocks * stride));
    Buffer<uint64_t> sizes(test, "sizes", (int64_t)blocks);
    int64_t used = (int64_t)coder.alphabet.size() - 1;
    for (uint64_t i = 0; i < count; ++i)
        symbols[(int64_t)i] = coder.alphabet[(size_t)random.between(0, used)];
    // In two calls, as two threads would.
    uint64_t middle = (uint64_t)random.between(0, (int64_t)blocks);
    const std::pair<uint64_t, uint64_t> halves[] = {{middle, blocks}, {0, middle}};
    for (auto [first, last] : halves)
        returned(test, "encoding",
                 coder.encode(lanes, block, symbols.data(), count, first, last,
                              out.data() + first * stride, stride, sizes.data() + first),
                 QKIT_ENTROPY_OK);
    if (test.failed) return;
    Buffer<uint64_t> offsets(test, "offsets", (int64_t)blocks + 1);
    offsets[0] = 0;
    for (int64_t b = 0; b < (int64_t)blocks; ++b) {
        if (sizes[b] > qkit_entropy_bound(block, lanes))
            return test.fail("a block of %llu bytes", (unsigned long long)sizes[b]);
        offsets[b + 1] = offsets[b] + sizes[b];
    }
    Buffer<uint8_t> payload(test, "payload", (int64_t)offsets[(int64_t)blocks]);
    for (int64_t b = 0; b < (int64_t)blocks; ++b)
        memcpy(payload.data() + offsets[b], out.data() + b * (int64_t)stride, sizes[b]);

    Buffer<uint8_t> back(test, "back", (int64_t)count);
    for (auto [first, last] : halves)
        returned(test, "decoding",
                 coder.decode(lanes, block, payload.data(), (uint64_t)payload.size, offsets.data(),
                              first, last, back.data(), count),
                 QKIT_ENTROPY_OK);
    for (int64_t i = 0; i < back.size; ++i) back.must_be(i, symbols[i]);
    corrupt(test, coder, lanes, block, count, payload, offsets);
    resized(test, coder, lanes, block, count, payload, offsets);
    refused(test, coder, lanes, block, count, symbols, out, stride, sizes, blocks);
}

void huffman(Case& test) { round_trip(test, Coder::huffman(test.random)); }
void ans(Case& test) { round_trip(test, Coder::ans(test.random)); }

}  // namespace

const Check entropy_checks[] = {
    {"qkit_huffman", huffman},
    {"qkit_ans", ans},
    {nullptr, nullptr},
};
