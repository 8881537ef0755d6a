// Entropy coding of byte symbols in independent blocks: canonical Huffman codes and range ANS.
//
// Plain C ABI; no state, no threads, no exceptions: calls on disjoint block ranges may run at the
// same time. The streams are those that qkit/packing/entropy/huffman.py and ans.py document.
//
// `count` symbols are cut into blocks of `block` symbols, the last one shorter. Every function
// treats the blocks [first, last). Each block holds `lanes` (1..32) interleaved streams.
//
//   encode  reads symbols[0, count); block b is written at out + (b - first) * stride, which must
//           hold qkit_entropy_bound(block, lanes) bytes; its length goes to sizes[b - first].
//   decode  block b is payload[offsets[b], offsets[b + 1]) and is written to
//           out[b * block, min((b + 1) * block, count)).
//
// Decoders never read outside the payload nor write outside those output bytes, whatever the
// input is: tables, offsets and streams are checked. No alignment of the byte pointers is needed;
// input and output must not overlap.
#pragma once
#include "qkit.h"

enum {
    QKIT_ENTROPY_OK = 0,
    QKIT_ENTROPY_ARGUMENT = 1,  // a size, a range or a symbol without a code
    QKIT_ENTROPY_TABLE = 2,    // not a complete prefix code; frequencies that do not add up
    QKIT_ENTROPY_STREAM = 3,   // the stream does not decode to exactly its block
    QKIT_ENTROPY_MEMORY = 4
};

// Bytes that one encoded block takes at most.
QKIT_API uint64_t qkit_entropy_bound(uint64_t block, uint32_t lanes);

// lengths[256]: bits of each symbol's code, 0 (absent) to 12.
QKIT_API int32_t qkit_huffman_encode(const uint8_t* lengths, uint32_t lanes, uint64_t block,
                                     const uint8_t* symbols, uint64_t count, uint64_t first,
                                     uint64_t last, uint8_t* out, uint64_t stride,
                                     uint64_t* sizes);
QKIT_API int32_t qkit_huffman_decode(const uint8_t* lengths, uint32_t lanes, uint64_t block,
                                     const uint8_t* payload, uint64_t payload_bytes,
                                     const uint64_t* offsets, uint64_t first, uint64_t last,
                                     uint8_t* out, uint64_t count);

// frequencies[256]: 0 (absent) to 2^bits, with the sum 2^bits; bits is 12..15.
QKIT_API int32_t qkit_ans_encode(const uint16_t* frequencies, uint32_t bits, uint32_t lanes,
                                 uint64_t block, const uint8_t* symbols, uint64_t count,
                                 uint64_t first, uint64_t last, uint8_t* out, uint64_t stride,
                                 uint64_t* sizes);
QKIT_API int32_t qkit_ans_decode(const uint16_t* frequencies, uint32_t bits, uint32_t lanes,
                                 uint64_t block, const uint8_t* payload, uint64_t payload_bytes,
                                 const uint64_t* offsets, uint64_t first, uint64_t last,
                                 uint8_t* out, uint64_t count);
