// Products of bfloat16 values, two tokens to each lane. Included once, for AVX-512 with vdpbf16ps.
#include "register_tiles.h"

// Columns [0, count) of x, tokens [0, tokens): panels [panel][ceil(tokens / 2)][WIDTH] of (first, second) token, zero
// where x has none.
template <int64_t WIDTH>
static void pack_pairs(const uint16_t* x, int64_t channels, int64_t count, int64_t tokens, float* to) {
    static_assert(WIDTH == 2 * kLanes || WIDTH == kLanes / 2, "whole vectors or half of one");
    for (int64_t first = 0; first < count; first += WIDTH) {
        const int64_t valid = count - first < WIDTH ? count - first : WIDTH;
        for (int64_t t = 0; t < tokens; t += 2, to += WIDTH) {
            const uint16_t *even = x + t * channels + first, *odd = even + channels;
            uint32_t pairs[WIDTH];
            if (valid == WIDTH && t + 1 < tokens) {
                for (int64_t c = 0; c < WIDTH; ++c) pairs[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
            } else {
                for (int64_t c = 0; c < WIDTH; ++c) {
                    const uint32_t high = c < valid && t + 1 < tokens ? odd[c] : 0;
                    pairs[c] = (c < valid ? even[c] : 0) | high << 16;
                }
            }
            __builtin_memcpy(to, pairs, sizeof pairs);
        }
    }
}

static void gemm_tile(const GemmOf<uint16_t>& g, int64_t tile, float* scratch) {
    const int64_t across = (g.n + kGemmColumns - 1) / kGemmColumns;
    const int64_t i0 = tile / across * kGemmRows, j0 = tile % across * kGemmColumns;
    const int64_t i1 = i0 + kGemmRows < g.m ? i0 + kGemmRows : g.m;
    const int64_t j1 = j0 + kGemmColumns < g.n ? j0 + kGemmColumns : g.n;
    if (i1 <= j0) return;
    float *a = scratch, *b = scratch + kGemmRows * kGemmDepth;
    for (int64_t t = 0; t < g.k; t += 2 * kGemmDepth) {
        const int64_t tokens = g.k - t < 2 * kGemmDepth ? g.k - t : 2 * kGemmDepth;
        pack_pairs<kTileRows>(g.a + t * g.a_column + i0, g.a_column, i1 - i0, tokens, a);
        pack_pairs<kTileColumns>(g.b + t * g.b_row + j0, g.b_row, j1 - j0, tokens, b);
        register_tiles(g, i0, i1, j0, j1, 0, (tokens + 1) / 2, a, b, true);
    }
}
