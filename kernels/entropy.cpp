// Huffman and range ANS block coders; entropy.h states the contract.

#include "entropy.h"

#include <cstring>
#include <memory>
#include <new>

#include "pool.h"

#if !defined(_WIN32) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the streams are read and written as little-endian words"
#endif

namespace {

constexpr uint32_t max_lanes = 32;
constexpr uint32_t max_length = 12;
constexpr uint32_t table_size = 1u << max_length;
constexpr uint32_t lower_bound = AnsTable::lower_bound;

template <class T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
void store(uint8_t* p, T value) {
    std::memcpy(p, &value, sizeof value);
}

uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

// The blocks that a call treats; `valid` also means that no product below can overflow.
struct Blocks {
    uint64_t block, count, first, last;

    bool valid(uint32_t lanes) const {
        return lanes >= 1 && lanes <= max_lanes && block >= 1 && block <= (1ull << 32) &&
               count < (1ull << 56) && first <= last && last <= (count + block - 1) / block;
    }
    uint64_t begin(uint64_t b) const { return b * block; }
    uint64_t size(uint64_t b) const { return smaller(block, count - b * block); }
};

template <class Encode>
int32_t encode_blocks(Blocks blocks, uint32_t lanes, uint8_t* out, uint64_t stride,
                      uint64_t* sizes, Encode encode) {
    if (stride < qkit_entropy_bound(blocks.block, lanes)) return QKIT_ENTROPY_ARGUMENT;
    for (uint64_t b = blocks.first; b < blocks.last; ++b, out += stride, ++sizes) {
        int32_t status = encode(blocks.begin(b), blocks.size(b), out, sizes);
        if (status) return status;
    }
    return QKIT_ENTROPY_OK;
}

template <class Decode>
int32_t decode_blocks(Blocks blocks, const uint8_t* payload, uint64_t payload_bytes,
                      const uint64_t* offsets, uint8_t* out, Decode decode) {
    for (uint64_t b = blocks.first; b < blocks.last; ++b) {
        uint64_t begin = offsets[b], end = offsets[b + 1];
        if (begin > end || end > payload_bytes) return QKIT_ENTROPY_ARGUMENT;
        if (!decode(payload + begin, end - begin, out + blocks.begin(b), blocks.size(b)))
            return QKIT_ENTROPY_STREAM;
    }
    return QKIT_ENTROPY_OK;
}

// ---------------------------------------------------------------------------------- Huffman

// Canonical codes (RFC 1951, section 3.2.2), their bits reversed because a stream is read from
// its least significant bit. False if the lengths are not those of a complete code.
bool canonical_codes(const uint8_t* lengths, uint16_t* codes) {
    uint32_t with_length[max_length + 1] = {}, next[max_length + 1] = {}, kraft = 0, present = 0;
    for (int s = 0; s < 256; ++s) {
        if (lengths[s] > max_length) return false;
        ++with_length[lengths[s]];
        if (lengths[s]) {
            kraft += table_size >> lengths[s];
            ++present;
        }
    }
    // One symbol alone has the code 0, and the code 1 is read as the same symbol.
    bool single = present == 1 && with_length[1] == 1;
    if (kraft != table_size && !single) return false;
    uint32_t code = 0;
    for (uint32_t n = 1; n <= max_length; ++n) {
        code = (code + (n > 1 ? with_length[n - 1] : 0)) << 1;
        next[n] = code;
    }
    for (int s = 0; s < 256; ++s) {
        uint32_t reversed = 0, straight = lengths[s] ? next[lengths[s]]++ : 0;
        for (uint32_t i = 0; i < lengths[s]; ++i)
            reversed |= (straight >> i & 1) << (lengths[s] - 1 - i);
        codes[s] = static_cast<uint16_t>(reversed);
    }
    return true;
}

// What the next 12 bits hold: one symbol, or two where both codes fit.
//   bits 0-7 first symbol, 8-15 second symbol, 16-19 length of the first code,
//   20-23 length of all, 24-25 number of symbols
struct HuffmanTable {
    uint32_t entry[table_size];

    bool build(const uint8_t* lengths) {
        uint16_t codes[256];
        uint16_t single[table_size];  // symbol | length << 8
        if (!canonical_codes(lengths, codes)) return false;
        uint32_t kraft = 0;
        for (uint32_t s = 0; s < 256; ++s) {
            if (!lengths[s]) continue;
            kraft += table_size >> lengths[s];
            for (uint32_t i = codes[s]; i < table_size; i += 1u << lengths[s])
                single[i] = static_cast<uint16_t>(s | lengths[s] << 8);
        }
        if (kraft != table_size)  // one symbol alone
            for (uint32_t i = 1; i < table_size; i += 2) single[i] = single[0];
        for (uint32_t i = 0; i < table_size; ++i) {
            uint32_t length = single[i] >> 8, second = single[i >> length];
            uint32_t both = length + (second >> 8);
            entry[i] = (single[i] & 0xff) | length << 16;
            entry[i] |= both <= max_length ? (second & 0xff) << 8 | both << 20 | 2u << 24
                                           : length << 20 | 1u << 24;
        }
        return true;
    }
};

struct Lane {
    const uint8_t* data;
    uint64_t size, position;  // bytes; bits read
    uint8_t* out, *end;

    bool roomy() const { return end - out >= 8 && (position >> 3) + 8 <= size; }

    uint64_t window() const { return load<uint64_t>(data + (position >> 3)) >> (position & 7); }

    bool finish(const HuffmanTable &table) {
        while (out < end) {
            uint64_t byte = position >> 3;
            if (byte >= size) return false;
            uint32_t bits = 0;
            for (uint64_t i = 0; i < smaller(size - byte, 3); ++i)
                bits |= static_cast<uint32_t>(data[byte + i]) << (8 * i);
            uint32_t entry = table.entry[bits >> (position & 7) & (table_size - 1)];
            *out++ = static_cast<uint8_t>(entry);
            position += entry >> 16 & 15;
        }
        return (position + 7) / 8 == size;
    }
};

// Several lanes in turn, because each lookup waits for the one before it in its own lane.
template <int N>
bool decode_lanes(const HuffmanTable &table, Lane* given) {
    Lane lanes[N];
    for (int j = 0; j < N; ++j) lanes[j] = given[j];
    for (;;) {
        bool roomy = true;
        for (int j = 0; j < N; ++j) roomy &= lanes[j].roomy();
        if (!roomy) break;
        uint64_t window[N];
        for (int j = 0; j < N; ++j) window[j] = lanes[j].window();
        for (int round = 0; round < 4; ++round)  // a window holds 57 bits: 4 times 12
            for (int j = 0; j < N; ++j) {
                uint32_t entry = table.entry[window[j] & (table_size - 1)];
                uint32_t length = entry >> 20 & 15;
                store<uint16_t>(lanes[j].out, static_cast<uint16_t>(entry));
                lanes[j].out += entry >> 24;
                lanes[j].position += length;
                window[j] >>= length;
            }
    }
    bool good = true;
    for (int j = 0; j < N; ++j) good &= lanes[j].finish(table);
    return good;
}

bool huffman_decode_block(const HuffmanTable &table, uint32_t lanes, const uint8_t* in,
                          uint64_t size, uint8_t* out, uint64_t count) {
    if (size < 2ull * lanes) return false;
    Lane all[max_lanes];
    uint64_t each = (count + lanes - 1) / lanes, at = 2ull * lanes;
    for (uint32_t j = 0; j < lanes; ++j) {
        uint64_t bytes = load<uint16_t>(in + 2 * j);
        if (bytes > size - at) return false;
        uint64_t begin = smaller(j * each, count), end = smaller(begin + each, count);
        all[j] = {in + at, bytes, 0, out + begin, out + end};
        at += bytes;
    }
    if (at != size) return false;
    uint32_t j = 0;
    for (; j + 4 <= lanes; j += 4)
        if (!decode_lanes<4>(table, all + j)) return false;
    for (; j < lanes; ++j)
        if (!decode_lanes<1>(table, all + j)) return false;
    return true;
}

int32_t huffman_encode_block(const uint8_t* lengths, const uint16_t* codes, uint32_t lanes,
                             const uint8_t* symbols, uint64_t count, uint8_t* out,
                             uint64_t* size) {
    uint64_t each = (count + lanes - 1) / lanes;
    uint8_t* p = out + 2ull * lanes;
    for (uint32_t j = 0; j < lanes; ++j) {
        const uint8_t* s = symbols + smaller(j * each, count);
        const uint8_t* end = symbols + smaller((j + 1) * each, count);
        uint8_t* begin = p;
        uint64_t buffer = 0;
        uint32_t filled = 0;
        for (; s < end; ++s) {
            if (!lengths[*s]) return QKIT_ENTROPY_ARGUMENT;
            buffer |= static_cast<uint64_t>(codes[*s]) << filled;
            filled += lengths[*s];
            if (filled >= 32) {
                store<uint32_t>(p, static_cast<uint32_t>(buffer));
                p += 4, buffer >>= 32, filled -= 32;
            }
        }
        for (; filled; filled -= filled < 8 ? filled : 8, buffer >>= 8)
            *p++ = static_cast<uint8_t>(buffer);
        if (p - begin > 0xffff) return QKIT_ENTROPY_ARGUMENT;
        store<uint16_t>(out + 2 * j, static_cast<uint16_t>(p - begin));
    }
    *size = static_cast<uint64_t>(p - out);
    return QKIT_ENTROPY_OK;
}

// -------------------------------------------------------------------------------- range ANS

bool valid_frequencies(const uint16_t* frequencies, uint32_t bits) {
    if (bits < 12 || bits > AnsTable::max_bits) return false;
    uint32_t sum = 0;
    for (int s = 0; s < 256; ++s) sum += frequencies[s];
    return sum == 1u << bits;
}

void build(AnsTable &table, const uint16_t* frequencies) {
    uint32_t slot = 0;
    for (uint32_t s = 0; s < 256; ++s)
        for (uint32_t rank = 0; rank < frequencies[s]; ++rank, ++slot) {
            table.step[slot] = frequencies[s] | rank << 16;
            table.symbol[slot] = static_cast<uint8_t>(s);
        }
}

// No overflow: frequency * (x >> bits) + rank < 2^bits * 2^(32 - bits).
uint32_t next(const AnsTable &table, uint32_t x, uint32_t bits, uint8_t* out) {
    uint32_t slot = x & ((1u << bits) - 1);
    *out = table.symbol[slot];
    return (table.step[slot] & 0xffff) * (x >> bits) + (table.step[slot] >> 16);
}

// `Lanes` is a constant in the common case, so that the inner loop is unrolled; 0 means `given`.
template <uint32_t Lanes>
bool ans_decode_block(const AnsTable &table, uint32_t bits, uint32_t given, const uint8_t* in,
                      uint64_t size, uint8_t* out, uint64_t count) {
    const uint32_t lanes = Lanes ? Lanes : given;
    if (size < 4ull * lanes || size % 2) return false;
    uint32_t x[max_lanes];
    for (uint32_t j = 0; j < lanes; ++j) {
        x[j] = load<uint32_t>(in + 4 * j);
        if (x[j] < lower_bound) return false;
    }
    const uint8_t* p = in + 4ull * lanes, *end = in + size;
    uint64_t i = 0;
    if (auto rounds = Lanes == max_lanes ? ::table().ans_rounds : nullptr)
        i = rounds(table, bits, x, &p, end, out, count);
    for (; i + lanes <= count && static_cast<uint64_t>(end - p) >= 2ull * lanes; i += lanes)
        for (uint32_t j = 0; j < lanes; ++j) {
            uint32_t y = next(table, x[j], bits, out + i + j);
            // Without a branch, which could not be predicted.
            uint32_t low = 0u - (y < lower_bound);
            x[j] = y << (low & 16) | (load<uint16_t>(p) & low);
            p += low & 2;
        }
    for (uint32_t j = 0; i < count; ++i, j = j + 1 == lanes ? 0 : j + 1) {
        x[j] = next(table, x[j], bits, out + i);
        if (x[j] >= lower_bound) continue;
        if (p == end) return false;
        x[j] = x[j] << 16 | load<uint16_t>(p);
        p += 2;
    }
    for (uint32_t j = 0; j < lanes; ++j)
        if (x[j] != lower_bound) return false;
    return p == end;
}

// Division by a frequency f as a multiplication: floor(x * m / 2^k) with k = 32 + bits and
// m = floor(2^k / f) + 1 equals floor(x / f) for x < f * 2^(32 - bits), and does not overflow.
struct AnsSymbol {
    uint64_t multiplier, limit;
    uint32_t frequency, start;
};

int32_t ans_encode_block(const AnsSymbol* table, uint32_t bits, uint32_t lanes,
                         const uint8_t* symbols, uint64_t count, uint8_t* out, uint64_t stride,
                         uint64_t* size) {
    uint32_t x[max_lanes];
    for (uint32_t j = 0; j < lanes; ++j) x[j] = lower_bound;
    uint8_t* end = out + stride, *p = end;  // the words come out backwards
    uint32_t j = static_cast<uint32_t>(count % lanes);
    for (uint64_t i = count; i-- > 0;) {
        j = j ? j - 1 : lanes - 1;
        const AnsSymbol &s = table[symbols[i]];
        if (!s.frequency) return QKIT_ENTROPY_ARGUMENT;
        uint32_t y = x[j];
        store<uint16_t>(p - 2, static_cast<uint16_t>(y));
        uint32_t full = 0u - (y >= s.limit);  // as a mask, because a branch is not predictable
        p -= full & 2;
        y >>= full & 16;
        uint32_t quotient = static_cast<uint32_t>(y * s.multiplier >> (32 + bits));
        x[j] = (quotient << bits) + (y - quotient * s.frequency) + s.start;
    }
    uint64_t words = static_cast<uint64_t>(end - p);
    for (uint32_t k = 0; k < lanes; ++k) store<uint32_t>(out + 4 * k, x[k]);
    std::memmove(out + 4ull * lanes, p, words);
    *size = 4ull * lanes + words;
    return QKIT_ENTROPY_OK;
}

}  // namespace

// ANS: a state and a word for each symbol, and the word that is stored before it is known to be
// needed. Huffman: less.
uint64_t qkit_entropy_bound(uint64_t block, uint32_t lanes) {
    return 2 * block + 4ull * lanes + 8;
}

int32_t qkit_huffman_encode(const uint8_t* lengths, uint32_t lanes, uint64_t block,
                            const uint8_t* symbols, uint64_t count, uint64_t first, uint64_t last,
                            uint8_t* out, uint64_t stride, uint64_t* sizes) {
    Blocks blocks{block, count, first, last};
    uint16_t codes[256];
    if (!blocks.valid(lanes)) return QKIT_ENTROPY_ARGUMENT;
    if (!canonical_codes(lengths, codes)) return QKIT_ENTROPY_TABLE;
    return encode_blocks(blocks, lanes, out, stride, sizes,
                         [&](uint64_t at, uint64_t n, uint8_t* to, uint64_t* size) {
                             return huffman_encode_block(lengths, codes, lanes, symbols + at, n,
                                                         to, size);
                         });
}

int32_t qkit_huffman_decode(const uint8_t* lengths, uint32_t lanes, uint64_t block,
                            const uint8_t* payload, uint64_t payload_bytes,
                            const uint64_t* offsets, uint64_t first, uint64_t last, uint8_t* out,
                            uint64_t count) {
    Blocks blocks{block, count, first, last};
    if (!blocks.valid(lanes)) return QKIT_ENTROPY_ARGUMENT;
    std::unique_ptr<HuffmanTable> table(new (std::nothrow) HuffmanTable);
    if (!table) return QKIT_ENTROPY_MEMORY;
    if (!table->build(lengths)) return QKIT_ENTROPY_TABLE;
    return decode_blocks(blocks, payload, payload_bytes, offsets, out,
                         [&](const uint8_t* in, uint64_t size, uint8_t* to, uint64_t n) {
                             return huffman_decode_block(*table, lanes, in, size, to, n);
                         });
}

int32_t qkit_ans_encode(const uint16_t* frequencies, uint32_t bits, uint32_t lanes,
                        uint64_t block, const uint8_t* symbols, uint64_t count, uint64_t first,
                        uint64_t last, uint8_t* out, uint64_t stride, uint64_t* sizes) {
    Blocks blocks{block, count, first, last};
    if (!blocks.valid(lanes)) return QKIT_ENTROPY_ARGUMENT;
    if (!valid_frequencies(frequencies, bits)) return QKIT_ENTROPY_TABLE;
    AnsSymbol table[256] = {};
    uint32_t start = 0;
    for (int s = 0; s < 256; ++s) {
        uint32_t f = frequencies[s];
        if (f) table[s] = {(1ull << (32 + bits)) / f + 1, static_cast<uint64_t>(f) << (32 - bits),
                           f, start};
        start += f;
    }
    return encode_blocks(blocks, lanes, out, stride, sizes,
                         [&](uint64_t at, uint64_t n, uint8_t* to, uint64_t* size) {
                             return ans_encode_block(table, bits, lanes, symbols + at, n, to,
                                                     stride, size);
                         });
}

int32_t qkit_ans_decode(const uint16_t* frequencies, uint32_t bits, uint32_t lanes,
                        uint64_t block, const uint8_t* payload, uint64_t payload_bytes,
                        const uint64_t* offsets, uint64_t first, uint64_t last, uint8_t* out,
                        uint64_t count) {
    Blocks blocks{block, count, first, last};
    if (!blocks.valid(lanes)) return QKIT_ENTROPY_ARGUMENT;
    if (!valid_frequencies(frequencies, bits)) return QKIT_ENTROPY_TABLE;
    std::unique_ptr<AnsTable> table(new (std::nothrow) AnsTable);
    if (!table) return QKIT_ENTROPY_MEMORY;
    build(*table, frequencies);
    auto decode = lanes == max_lanes ? ans_decode_block<max_lanes> : ans_decode_block<0>;
    return decode_blocks(blocks, payload, payload_bytes, offsets, out,
                         [&](const uint8_t* in, uint64_t size, uint8_t* to, uint64_t n) {
                             return decode(*table, bits, lanes, in, size, to, n);
                         });
}
