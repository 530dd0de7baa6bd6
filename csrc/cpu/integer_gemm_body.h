#if NT_LANES > 4 || defined(NT_DOTPROD)

// y = x @ dequant(W)^T by integer products: x as signed bytes times the codes as they are, four at a time (vpdpbusd,
// sdot), exact in int32; scales and zeros are applied once per run of x.
//
// x is split into P planes of bytes, x ~ scale * sum_p 256^(P-1-p) * plane_p: one plane is int8 per run ("a8"), two are
// 16 bits ("a16"), three 24 ("a24", float32's own precision). The codes' zero is a product too: sum (q - z) x = sum q x
// - z sum x.

#include "row_grid_body.h"
#include "split_planes_body.h"

// Runs summed in float32 before their sum is added to the total, so that long rows keep their precision.
static constexpr int kRunsPerPartial = 16;

// How far ahead the words are fetched, in int32: two pages, as the hardware's prefetchers stop at a page's end. Without
// it one row of x reads memory at half its speed.
static constexpr int64_t kPrefetch = 2048;

// A tile of y is rows of x times kColumns columns, so that a broadcast of x serves two vectors of codes: broadcasts are
// what limits processors that multiply two vectors of bytes per cycle. The sums of a tile fill the registers.
static constexpr int kVectors = 2;
static constexpr int64_t kColumns = kVectors * kLanes;
// Few rows wait for memory, which is fastest read front to back: one block of the packed weight after the other.
template <int M>
constexpr int vectors() {
    return kLanes == kPackedLanes && M <= 2 ? 1 : kVectors;
}
// And their sums are too few to hide the product's latency: every other row of codes is summed apart.
template <int M>
constexpr int chains() {
    return M * vectors<M>() <= 2 ? 2 : 1;
}
template <int P>
constexpr int max_tile_rows() {
    return kLanes == 8 ? 2 : P == 1 ? 8 : 4;
}

// Tile rows for `left` rows of x: the largest tile that they fill, or one row short of it.
template <int P>
static int tile_rows(int64_t left) {
    for (const int rows : {8, 4, 2})
        if (rows <= max_tile_rows<P>() && left >= rows - (rows > 2)) return rows;
    return 1;
}

#if defined(NT_VNNI) && NT_LANES == 16
NT_INLINE vi dot4(vi sum, vi codes, int32_t bytes) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(bytes));
}
#elif defined(NT_VNNI)
NT_INLINE vi dot4(vi sum, vi codes, int32_t bytes) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(bytes));
}
#elif defined(NT_DOTPROD)
NT_INLINE vi dot4(vi sum, vi codes, int32_t bytes) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)vdupq_n_s32(bytes));
}
#elif NT_LANES == 16
NT_INLINE vi dot4_scaled(vi sum, vi codes, int32_t bytes, int16_t factor) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(bytes));
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(factor));
}
#elif NT_LANES == 8
NT_INLINE vi dot4_scaled(vi sum, vi codes, int32_t bytes, int16_t factor) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(bytes));
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
}
#endif

// sum + codes . bytes, for codes of BITS bits.
template <int BITS>
NT_INLINE vi dot(vi sum, vi codes, int32_t bytes) {
#if NT_LANES >= 8 && !defined(NT_VNNI)
    // Pairs are summed in int16, which 255 * 128 * 2 would saturate: codes of 8 bits go by halves.
    if constexpr (BITS == 8) {
        sum = dot4_scaled(sum, codes & 0x0f0f0f0f, bytes, 1);
        return dot4_scaled(sum, (codes >> 4) & 0x0f0f0f0f, bytes, 16);
    }
    return dot4_scaled(sum, codes, bytes, 1);
#else
    return dot4(sum, codes, bytes);
#endif
}

// zero * minus_sum for a sum of bytes that fits 16 bits.
NT_INLINE vi zero_term(vi zero, int32_t minus_sum) {
#if NT_LANES == 16
    return (vi)_mm512_madd_epi16((__m512i)zero, _mm512_set1_epi32(minus_sum & 0xffff));
#elif NT_LANES == 8
    return (vi)_mm256_madd_epi16((__m256i)zero, _mm256_set1_epi32(minus_sum & 0xffff));
#else
    return zero * minus_sum;
#endif
}

// Codes k = 4 * row + byte of a chunk, one byte each.
template <int BITS>
NT_INLINE vi code_bytes(const vi* words, int row) {
    if constexpr (BITS == 8) return kSignedOffset ? words[row] ^ static_cast<int32_t>(0x80808080u) : words[row];
    if constexpr (BITS == 4) return (words[row / 2] >> (4 * (row % 2))) & 0x0f0f0f0f;
    const vi low = (words[row / 4] >> (2 * (row % 4))) & 0x03030303;
    if constexpr (BITS == 2) return low;
    const vi high = row < 2 ? words[2] << (2 - row) : words[2] >> (row - 2);
    return low | (high & 0x04040404);
}

// The scales and signed zeros of a group. A group's lie a whole row of N away from the last group's, where no hardware
// prefetcher looks: those of the next columns are fetched, which are wanted when this strip of the weight is done.
NT_INLINE RowGrid signed_grid(const PackedWeight& w, int64_t group, int64_t n) {
    RowGrid grid = row_grid(w, group, n);
    if (w.bits == 8) grid.zero -= kSignedOffset;
    const int64_t next = group * w.n + n + kColumns;
    __builtin_prefetch(static_cast<const char*>(w.scales) + next * (w.scale_dtype == Dtype::float16 ? 2 : 4));
    if (w.zeros) __builtin_prefetch(w.zeros + next);
    return grid;
}

NT_INLINE void store_run(void* y, Dtype dtype, int64_t at, int64_t valid, vf values) {
    if (dtype == Dtype::float32) {
        float* out = static_cast<float*>(y) + at;
        valid == kLanes ? store(out, values) : store_valid(out, values, valid);
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(y) + at;
    const vh halves = dtype == Dtype::bfloat16 ? any_float_to_bfloat16(values) : any_float_to_half(values);
    valid == kLanes ? store(out, halves) : store_valid(out, halves, valid);
}

// y's values of kColumns columns from n on and M rows of x, without bias. Where the weight has one vector of columns
// left, it is computed twice.
template <int BITS, int P, int M>
NT_INLINE void tile_sums(const IntegerGemm& a, int64_t n, const TileOfX& tile, vf (*totals)[vectors<M>()]) {
    constexpr int V = vectors<M>(), C = chains<M>();
    vf sums[M][V] = {};
    int until = kRunsPerPartial;
    const PackedWeight& w = a.weight;
    const int64_t chunks = ceil_div(w.k, kChunk), chunks_per_group = w.groups == 1 ? chunks : w.k / w.groups / kChunk;
    const int64_t block = chunks * BITS * kPackedLanes, next = n + kLanes >= w.n        ? 0
                                                               : kLanes == kPackedLanes ? block
                                                                                        : kLanes;
    const int32_t* words = w.words + n / kPackedLanes * block + n % kPackedLanes;
    const int32_t *bytes = tile.bytes, *minus = tile.minus;
    const float* scales = tile.scales;
    const int64_t chunks_per_run = run_length(w, a.per_token) / kChunk;
    for (int64_t group = 0; group < w.groups; ++group) {
        RowGrid grid[V];
        for (int v = 0; v < V; ++v) grid[v] = signed_grid(w, group, n + v * kLanes);
        for (int64_t left = chunks_per_group; left > 0;) {
            vi sum[M][P][V], other[M][P][V] = {};
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
                for (int p = 0; p < P; ++p) {
                    const int32_t m = minus[i * P + p];
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v)
                        sum[i][p][v] = !w.zeros      ? m - vi{}
                                       : a.per_token ? grid[v].zero * m
                                                     : zero_term(grid[v].zero, m);
                }
            }
            minus += M * P;
            for (int64_t stop = left > chunks_per_run ? left - chunks_per_run : 0; left > stop; --left) {
                vi word[V][BITS];
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
                    for (int i = 0; i < BITS; ++i) {
                        const int32_t* p = words + v * next + i * kPackedLanes;
                        __builtin_prefetch(p + kPrefetch);
                        word[v][i] = load<vi>(p);
                    }
                }
                words += BITS * kPackedLanes;
#pragma GCC unroll 8
                for (int row = 0; row < 8; ++row) {
                    vi codes[V];
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) codes[v] = code_bytes<BITS>(word[v], row);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i)
#pragma GCC unroll 3
                        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
                            for (int v = 0; v < V; ++v) {
                                vi& chain = row % C ? other[i][p][v] : sum[i][p][v];
                                chain = dot<BITS>(chain, codes[v], bytes[(i * P + p) * 8 + row]);
                            }
                }
                bytes += M * P * 8;
            }
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    if constexpr (C > 1)
                        for (int p = 0; p < P; ++p) sum[i][p][v] += other[i][p][v];
                    vf total = to_float(P == 1 ? sum[i][0][v] : (sum[i][0][v] << 8) + sum[i][P > 1][v]);
                    if (P == 3) total = total * 256.0f + to_float(sum[i][P - 1][v]);
                    sums[i][v] += total * (grid[v].scale * scales[i]);
                }
            }
            if (!a.per_token) scales += M;
            if (--until) continue;
            until = kRunsPerPartial;
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    totals[i][v] += sums[i][v];
                    sums[i][v] = vf{};
                }
            }
        }
    }
    for (int i = 0; i < M; ++i)
        for (int v = 0; v < V; ++v) totals[i][v] += sums[i][v];
}

template <int BITS, int P, int M>
static void multiply_tile(const IntegerGemm& a, int64_t n, const TileOfX& tile, int64_t row, int64_t rows) {
    constexpr int V = vectors<M>();
    for (const int64_t end = n + kColumns < a.weight.n ? n + kColumns : a.weight.n; n < end;) {
        vf sums[M][V] = {};
        tile_sums<BITS, P, M>(a, n, tile, sums);
        for (int v = 0; v < V && n < end; ++v, n += kLanes) {
            const int64_t valid = a.weight.n - n < kLanes ? a.weight.n - n : kLanes;
            float bias[kLanes] = {};
            if (a.bias) copy_run(a.bias, a.dtype, n, valid, bias);
            for (int i = 0; i < rows; ++i)
                store_run(a.y, a.dtype, (row + i) * a.weight.n + n, valid, sums[i][v] + load<vf>(bias));
        }
    }
}

template <int BITS, int P>
NT_INLINE void multiply_bits(const IntegerGemm& a, int64_t n, const TileOfX& tile, int64_t row, int64_t rows,
                             int padded) {
    if constexpr (max_tile_rows<P>() == 8)
        if (padded == 8) return multiply_tile<BITS, P, 8>(a, n, tile, row, rows);
    if constexpr (max_tile_rows<P>() >= 4)
        if (padded == 4) return multiply_tile<BITS, P, 4>(a, n, tile, row, rows);
    if (padded == 2) return multiply_tile<BITS, P, 2>(a, n, tile, row, rows);
    multiply_tile<BITS, P, 1>(a, n, tile, row, rows);
}

template <int P>
static void multiply_planes(const IntegerGemm& a, int64_t n, const TileOfX& tile, int64_t row, int64_t rows,
                            int padded) {
    if (a.weight.bits == 2)
        multiply_bits<2, P>(a, n, tile, row, rows, padded);
    else if (a.weight.bits == 3)
        multiply_bits<3, P>(a, n, tile, row, rows, padded);
    else if (a.weight.bits == 4)
        multiply_bits<4, P>(a, n, tile, row, rows, padded);
    else
        multiply_bits<8, P>(a, n, tile, row, rows, padded);
}

template <int P>
static IntegerBody body_of_planes() {
    return {kColumns, run_length, tile_rows<P>, split_row<P>, multiply_planes<P>, [] {}, [] {}};
}
static IntegerBody integer_body(int planes) {
    return planes == 1 ? body_of_planes<1>() : planes == 2 ? body_of_planes<2>() : body_of_planes<3>();
}

#else

// The float32 kernel is as fast without a product of bytes.
static IntegerBody integer_body(int) {
    return {};
}

#endif
