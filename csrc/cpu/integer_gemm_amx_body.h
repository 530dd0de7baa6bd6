// The integer product of integer_gemm_body.h by AMX's tiles, beside avx512_vnni's body and in its namespace: a tile of
// x is one or two blocks of 16 rows, and fewer rows go to that body. A run's bytes of a block and the codes of 16
// columns become one product of tiles each, whose sums are scaled as there: both give the same values, bit for bit.
//
// Compiled for AMX, its logic executed with emulated tiles (amx_tiles.h), not yet run on an AMX processor.

// Up to 8 rows the other body reads the weight once too, and keeps the sums of its one tile in registers.
static constexpr int64_t kMinTiledRows = 9;
static constexpr int kBlock = kTileRows, kMaxBlocks = 2;
static constexpr int64_t kTileWords = kTileRows * kTileBytes / 4;
static_assert(kPiece == kTileBytes && kLanes * 4 == kTileBytes, "a tile holds the bytes of a piece, or a vector a row");

// Tiles 0 to 3 are sums, of two planes or blocks of x and two vectors of columns; 4 and 5 are x, 6 and 7 the codes.
template <class Tiles>
static void begin_tiles() {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
        config.rows[tile] = kTileRows;
        config.row_bytes[tile] = kTileBytes;
    }
    Tiles::configure(config);
}

template <int P>
static int tiled_rows(int64_t left) {
    return left > 2 * kBlock - kMinTiledRows + 1 ? 2 * kBlock : left >= kMinTiledRows ? kBlock : tile_rows<P>(left);
}

template <int P>
static void split_tiled_row(const IntegerGemm& a, int64_t source, int64_t row, int64_t rows, const TileOfX& tile) {
    rows < kBlock ? split_row<P>(a, source, row, rows, tile) : split_row<P, true>(a, source, row, rows, tile);
}

template <int BITS>
static void unpack_piece(const int32_t* words, int64_t next, int64_t chunks, int32_t (*codes)[kTileWords]) {
    for (int v = 0; v < kVectors; ++v) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            vi word[BITS];
#pragma GCC unroll 8
            for (int i = 0; i < BITS; ++i) {
                const int32_t* p = words + v * next + (chunk * BITS + i) * kPackedLanes;
                __builtin_prefetch(p + kPrefetch);
                word[i] = load<vi>(p);
            }
#pragma GCC unroll 8
            for (int row = 0; row < 8; ++row) store(codes[v] + (8 * chunk + row) * kLanes, code_bytes<BITS>(word, row));
        }
        // The tile of x reads on into its next row, and after the last into what follows the bytes of x: times zeros.
        if (chunks == 1)
            for (int row = 8; row < kTileRows; ++row) store(codes[v] + row * kLanes, vi{});
    }
}

// The codes of kColumns columns, piece after piece as split_row cuts a group; nothing is read after the last.
struct CodeReader {
    const int32_t* words;
    int64_t next, left, left_in_group, chunks_per_group;
    int bits;

    void read(int32_t (*codes)[kTileWords]) {
        if (left == 0) return;
        const int64_t chunks = left_in_group > 1 ? 2 : 1;
        if (bits == 2)
            unpack_piece<2>(words, next, chunks, codes);
        else if (bits == 3)
            unpack_piece<3>(words, next, chunks, codes);
        else if (bits == 4)
            unpack_piece<4>(words, next, chunks, codes);
        else
            unpack_piece<8>(words, next, chunks, codes);
        words += chunks * bits * kPackedLanes;
        left -= chunks;
        left_in_group -= chunks;
        if (left_in_group == 0) left_in_group = chunks_per_group;
    }
};

// products [block][plane][vector] of one run, without the zeros' part, into sums. The zero times the sums of two
// planes' bytes is one vpmaddwd: (zero << 7) * (first << 1) + zero * second, all in 16 bits; split_row made the other
// factors.
template <int P>
static void add_run(const IntegerGemm& a, const RowGrid* grid, int64_t rows, const int32_t (*products)[kTileWords],
                    const int32_t* minus, const float* scales, float (*sums)[kColumns]) {
    vi pairs[kVectors];
    for (int v = 0; v < kVectors; ++v) pairs[v] = P == 1 ? grid[v].zero : grid[v].zero | grid[v].zero << 23;
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t (*planes)[kTileWords] = products + i / kBlock * P * kVectors;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            const auto sum = [&](int p) { return load<vi>(planes[p * kVectors + v] + i % kBlock * kLanes); };
            const vi first = minus[i * P] - vi{};
            const vi part =
                a.per_token ? grid[v].zero * first : (vi)_mm512_madd_epi16((__m512i)pairs[v], (__m512i)first);
            vf total = to_float(part + (P == 1 ? sum(0) : (sum(0) << 8) + sum(P > 1)));
            if (P == 3) total = total * 256.0f + to_float(sum(P - 1) + zero_term(grid[v].zero, minus[i * P + P - 1]));
            store(sums[i] + v * kLanes, load<vf>(sums[i] + v * kLanes) + total * (grid[v].scale * scales[i]));
        }
    }
}

// Adds the sums of some runs to the totals and clears them.
static void add_partial(int64_t rows, float (*sums)[kColumns], float (*totals)[kColumns]) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < kColumns; c += kLanes) {
            store(totals[i] + c, load<vf>(totals[i] + c) + load<vf>(sums[i] + c));
            store(sums[i] + c, vf{});
        }
    }
}

// The products of one run with `bytes` of x, [piece][block][plane][row][count]. `codes` hold the run's first piece, and
// the next run's when this returns: the codes of a piece are unpacked while the one before is multiplied.
template <class Tiles>
static void multiply_run(CodeReader& reader, int32_t (*codes)[kVectors][kTileWords], int& current, int64_t chunks,
                         const int32_t* bytes, int64_t blocks, int32_t (*products)[kTileWords]) {
    // Where there are several pairs of blocks and planes, a run is one piece, whose codes stay in their tiles.
    for (int64_t pair = 0; pair < blocks; pair += 2) {
        const bool both = pair + 1 < blocks;
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template zero<2>();
        Tiles::template zero<3>();
        const int32_t* x = bytes;
        for (int64_t left = chunks; left > 0; left -= 2) {
            const int64_t words = (left > 1 ? kPiece : kChunk) / 4;
            if (pair == 0) {
                Tiles::template load<6>(codes[current][0], kTileBytes);
                Tiles::template load<7>(codes[current][1], kTileBytes);
                current ^= 1;
                reader.read(codes[current]);
            }
            Tiles::template load<4>(x + pair * kBlock * words, 4 * words);
            Tiles::template dot<0, 4, 6>();
            Tiles::template dot<1, 4, 7>();
            if (both) {
                Tiles::template load<5>(x + (pair + 1) * kBlock * words, 4 * words);
                Tiles::template dot<2, 5, 6>();
                Tiles::template dot<3, 5, 7>();
            }
            x += blocks * kBlock * words;
        }
        Tiles::template store<0>(products[2 * pair], kTileBytes);
        Tiles::template store<1>(products[2 * pair + 1], kTileBytes);
        if (both) {
            Tiles::template store<2>(products[2 * pair + 2], kTileBytes);
            Tiles::template store<3>(products[2 * pair + 3], kTileBytes);
        }
    }
}

template <class Tiles, int P>
static void multiply_tiled(const IntegerGemm& a, int64_t n, const TileOfX& tile, int64_t row, int64_t rows,
                           int padded) {
    if (padded < kBlock) return multiply_planes<P>(a, n, tile, row, rows, padded);
    const PackedWeight& w = a.weight;
    const int64_t chunks = ceil_div(w.k, kChunk), chunks_per_group = w.groups == 1 ? chunks : w.k / w.groups / kChunk;
    const int64_t block = chunks * w.bits * kPackedLanes, chunks_per_run = run_length(w, a.per_token) / kChunk;
    CodeReader reader = {w.words + n / kPackedLanes * block,
                         n + kLanes >= w.n ? 0 : block,
                         chunks,
                         chunks_per_group,
                         chunks_per_group,
                         w.bits};
    alignas(64) int32_t codes[2][kVectors][kTileWords], products[kMaxBlocks * P * kVectors][kTileWords];
    alignas(64) float sums[kMaxBlocks * kBlock][kColumns] = {}, totals[kMaxBlocks * kBlock][kColumns] = {};
    const int32_t *bytes = tile.bytes, *minus = tile.minus;
    const float* scales = tile.scales;
    int current = 0, until = kRunsPerPartial;
    reader.read(codes[current]);
    for (int64_t group = 0; group < w.groups; ++group) {
        const RowGrid grid[kVectors] = {signed_grid(w, group, n), signed_grid(w, group, n + kLanes)};
        for (int64_t left = chunks_per_group; left > 0; left -= chunks_per_run) {
            const int64_t run = left < chunks_per_run ? left : chunks_per_run;
            multiply_run<Tiles>(reader, codes, current, run, bytes, padded / kBlock * P, products);
            add_run<P>(a, grid, rows, products, minus, scales, sums);
            bytes += run * (kChunk / 4) * padded * P;
            minus += padded * P;
            if (!a.per_token) scales += padded;
            if (--until) continue;
            until = kRunsPerPartial;
            add_partial(rows, sums, totals);
        }
    }
    add_partial(rows, sums, totals);
    for (int v = 0; v < kVectors && n < w.n; ++v, n += kLanes) {
        const int64_t valid = w.n - n < kLanes ? w.n - n : kLanes;
        float bias[kLanes] = {};
        if (a.bias) copy_run(a.bias, a.dtype, n, valid, bias);
        for (int64_t i = 0; i < rows; ++i)
            store_run(a.y, a.dtype, (row + i) * w.n + n, valid, load<vf>(totals[i] + v * kLanes) + load<vf>(bias));
    }
}

template <class Tiles, int P>
static IntegerBody tiled_body_of_planes() {
    return {kColumns,           run_length,    tiled_rows<P>, split_tiled_row<P>, multiply_tiled<Tiles, P>,
            begin_tiles<Tiles>, Tiles::release};
}
template <class Tiles>
static IntegerBody tiled_body(int planes) {
    return planes == 1   ? tiled_body_of_planes<Tiles, 1>()
           : planes == 2 ? tiled_body_of_planes<Tiles, 2>()
                         : tiled_body_of_planes<Tiles, 3>();
}
