#include <memory>

#include "../packing.h"
#include "amx_tiles.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace normtweak {

// A tile of rows of x as `tile_sums` reads it, front to back; integer_gemm_amx_body.h has another order of bytes.
struct TileOfX {
    int32_t* bytes;  // [K/32][rows][P][8]: four values' bytes
    int32_t* minus;  // [runs][rows][P]: minus the sum of the run's bytes, in the low 16 bits
    float* scales;   // [runs][rows], or [rows] with one scale per token
};

// What integer_gemm.cpp calls: the length of a run, how many rows the next tile takes, how x is split into it, and its
// product with `columns` columns of the weight from n on, of which `rows` rows are kept; every thread calls `begin`
// before its products and `end` after them.
struct IntegerBody {
    int64_t columns;
    int64_t (*run_length)(const PackedWeight& weight, bool per_token);
    int (*tile_rows)(int64_t left);
    void (*split_row)(const IntegerGemm& a, int64_t source, int64_t row, int64_t rows, const TileOfX& tile);
    void (*multiply)(const IntegerGemm& a, int64_t n, const TileOfX& tile, int64_t row, int64_t rows, int padded);
    void (*begin)();
    void (*end)();
};

}  // namespace normtweak

#define NT_DOT
#define NT_BODY "integer_gemm_body.h"
#include "foreach_isa.h"

#if defined(__x86_64__)
#define NT_LANES 16
#define NT_VNNI
#include "isa_begin.h"
namespace normtweak::avx512_vnni {
#include "integer_gemm_amx_body.h"
}  // namespace normtweak::avx512_vnni
#include "isa_end.h"
#undef NT_VNNI
#undef NT_LANES
#endif

namespace normtweak {

namespace {

// Rows of x that are split at once: 256 keep the split x, 3 bytes a value at most, in a large cache and make reading
// the weights again for the next rows cheap.
constexpr int64_t kMaxRows = 256;
// Packed weights that every tile of x is multiplied with before the next are read: half of a small L2 cache.
constexpr int64_t kWeightBytes = 256 << 10;

// The most rows that a body's tile_rows adds to those that are left.
constexpr int64_t kMostPadding = 7;

struct Tile {
    int64_t row, rows;
    int padded;
    TileOfX x;
};

IntegerBody body_of(Isa isa, int planes) {
#if defined(__x86_64__)
    if (isa == Isa::amx) return avx512_vnni::tiled_body<AmxTiles>(planes);
    if (isa == Isa::amx_emulated) return avx512_vnni::tiled_body<EmulatedTiles>(planes);
#endif
    return NT_PICK_DOT(isa, integer_body)(planes);
}

}  // namespace

bool integer_gemm_supported(Isa isa, int64_t k, int64_t groups) {
    return isa != Isa::portable && (groups == 1 || k / groups % kChunk == 0);
}

void integer_gemm(Isa isa, int threads, const IntegerGemm& a) {
    const IntegerBody body = body_of(isa, a.planes);
    const int64_t k = ceil_div(a.weight.k, kChunk) * kChunk, chunks = k / kChunk, groups = a.weight.groups;
    const int64_t runs = groups * ceil_div(groups == 1 ? k : k / groups, body.run_length(a.weight, a.per_token));
    const int64_t strips = ceil_div(a.weight.n, body.columns), most = std::min(a.m, kMaxRows) + kMostPadding;
    const int64_t strip_bytes = chunks * a.weight.bits * body.columns * 4;
    // Values of one row of x, in 4-byte words: bytes, minus, scales.
    const int64_t row_words = a.planes * (k / 4 + runs) + runs;
    const Scratch memory(most * row_words);
    std::unique_ptr<Tile[]> tiles(new Tile[static_cast<size_t>(most)]);
    for (int64_t first = 0; first < a.m; first += kMaxRows) {
        const int64_t end = std::min(first + kMaxRows, a.m);
        int64_t count = 0;
        auto* at = reinterpret_cast<int32_t*>(memory.get());
        for (int64_t row = first; row < end; ++count) {
            const int padded = body.tile_rows(end - row);
            int32_t* minus = at + padded * a.planes * (k / 4);
            int32_t* scales = minus + padded * a.planes * runs;
            tiles[count] = {
                row, std::min<int64_t>(padded, end - row), padded, {at, minus, reinterpret_cast<float*>(scales)}};
            at += padded * row_words;
            row += padded;
        }
        parallel_parts(count, threads, [&](int64_t, int64_t begin, int64_t stop) {
            for (int64_t t = begin; t < stop; ++t)
                for (int64_t i = 0; i < tiles[t].padded; ++i)
                    body.split_row(a, i < tiles[t].rows ? tiles[t].row + i : -1, i, tiles[t].padded, tiles[t].x);
        });
        parallel_parts(strips, threads, [&](int64_t, int64_t begin, int64_t stop) {
            const int64_t together = std::max<int64_t>(1, kWeightBytes / strip_bytes);
            body.begin();
            for (int64_t strip = begin; strip < stop; strip += together)
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t i = strip; i < std::min(strip + together, stop); ++i)
                        body.multiply(a, i * body.columns, tiles[t].x, tiles[t].row, tiles[t].rows, tiles[t].padded);
            body.end();
        });
    }
}

}  // namespace normtweak
