// The packed layout in C++; its twin, with the layout's description, is kernels/normtweak_kernels/packing.py.
#pragma once

#include <cstdint>

namespace normtweak {

constexpr int64_t kChunk = 32;        // codes along K that share `bits` words
constexpr int64_t kPackedLanes = 16;  // rows of the weight side by side in a 64-byte vector

// Which bits of a chunk's words hold code k = 4 * row + byte: `width` bits of word `word` from bit `shift` on.
struct Slot {
    int word, shift;
};

// Every width but 3, whose low two bits this gives as if it had 2; `high_slot` gives the third.
constexpr Slot low_slot(int bits, int row, int byte) {
    const int width = bits == 3 ? 2 : bits, per_byte = 8 / width;
    return {row / per_byte, 8 * byte + width * (row % per_byte)};
}

constexpr Slot high_slot(int row, int byte) {
    return {2, 8 * byte + row};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace normtweak
