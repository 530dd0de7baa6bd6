// Register tiles of kTileRows x kTileColumns, and the panels that their operands are packed into. Included inside the
// bodies that need them, after lanes.h; <immintrin.h> and NT_BFLOAT16_PAIRS come before it where a "float" of a
// panel is a pair of bfloat16 values.

// Sixteen (AVX-512) or twelve accumulators: enough to hide the latency of two multiply-adds a cycle, few enough to stay
// in registers with the operands; wider tiles ran no faster.
#if NT_LANES == 16
static constexpr int64_t kTileRows = 8, kVectors = 2;
#else
static constexpr int64_t kTileRows = 4, kVectors = 3;
#endif
static constexpr int64_t kTileColumns = kVectors * kLanes;
static_assert(kGemmRows % kTileRows == 0 && kGemmColumns % kTileColumns == 0, "tiles hold whole register tiles");

NT_INLINE vf multiply_add(vf sum, vf b, const float* a) {
#ifdef NT_BFLOAT16_PAIRS
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_ps(*a));
#else
    return sum + b * *a;
#endif
}

// C's register tile (+)= sign * sum over p of a[p][kTileRows]^T b[p][kTileColumns]. Without `accumulate` C isn't read.
static void multiply_panels(const float* a, const float* b, int64_t depth, float* c, int64_t c_row, float sign,
                            bool accumulate) {
    vf sums[kTileRows][kVectors] = {};
    if (accumulate) {
        // C is wanted at the end only, by then it is here: an eighth of a 4096 x 4096 solve's time.
        for (int64_t i = 0; i < kTileRows; ++i)
            for (int64_t v = 0; v < kTileColumns; v += 16) __builtin_prefetch(c + i * c_row + v, 1);
    }
#pragma GCC unroll 1
    for (int64_t p = 0; p < depth; ++p, a += kTileRows, b += kTileColumns) {
        vf bs[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bs[v] = load<vf>(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(sums[i][v], bs[v], a + i);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* to = c + i * c_row + v * kLanes;
            store(to, accumulate ? load<vf>(to) + sums[i][v] * sign : sums[i][v] * sign);
        }
    }
}

// Panels [panel][depth][WIDTH]: where the value of a lane, counted over all panels, stands.
template <int64_t WIDTH>
NT_INLINE float* panel_at(float* panels, int64_t depth, int64_t lane, int64_t p) {
    return panels + (lane / WIDTH * depth + p) * WIDTH + lane % WIDTH;
}

template <int64_t WIDTH>
NT_INLINE void pad_panels(int64_t count, int64_t depth, float* panels) {
    for (int64_t lane = count; lane % WIDTH; ++lane)
        for (int64_t p = 0; p < depth; ++p) *panel_at<WIDTH>(panels, depth, lane, p) = 0.0f;
}

// Panels of from[p * stride + lane], zero in the lanes past `count`. A few rows at a time, so that neither the rows
// read nor the panels written are too many pages at once.
template <int64_t WIDTH>
static void pack_rows(const float* from, int64_t stride, int64_t count, int64_t depth, float* panels) {
    constexpr int64_t kRows = 8;
    const int64_t whole = count / WIDTH * WIDTH;
    for (int64_t first = 0; first < depth; first += kRows) {
        const int64_t last = first + kRows < depth ? first + kRows : depth;
        for (int64_t lane = 0; lane < whole; lane += WIDTH)
            for (int64_t p = first; p < last; ++p) {
                __builtin_prefetch(from + (p + kRows) * stride + lane);
                __builtin_memcpy(panel_at<WIDTH>(panels, depth, lane, p), from + p * stride + lane, WIDTH * 4);
            }
        for (int64_t lane = whole; lane < count; ++lane)
            for (int64_t p = first; p < last; ++p) *panel_at<WIDTH>(panels, depth, lane, p) = from[p * stride + lane];
    }
    pad_panels<WIDTH>(count, depth, panels);
}

// Panels of from[lane * stride + p], zero in the lanes past `count`.
template <int64_t WIDTH>
static void pack_columns(const float* from, int64_t stride, int64_t count, int64_t depth, float* panels) {
    static_assert(WIDTH % kLanes == 0 || kLanes % WIDTH == 0, "vectors and panels hold whole numbers of each other");
    const int64_t lanes = count / kLanes * kLanes, whole = depth / kLanes * kLanes;
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        for (int64_t p = 0; p < whole; p += kLanes) {
            vf block[kLanes];
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; ++i) block[i] = load<vf>(from + (lane + i) * stride + p);
            transpose(block);
            constexpr int64_t kPiece = WIDTH < kLanes ? WIDTH : kLanes;
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; ++i) {
                for (int64_t piece = 0; piece < kLanes; piece += kPiece)
                    __builtin_memcpy(panel_at<WIDTH>(panels, depth, lane + piece, p + i),
                                     reinterpret_cast<const char*>(block + i) + 4 * piece, 4 * kPiece);
            }
        }
    }
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t p = lane < lanes ? whole : 0; p < depth; ++p)
            *panel_at<WIDTH>(panels, depth, lane, p) = from[lane * stride + p];
    pad_panels<WIDTH>(count, depth, panels);
}

// One register tile at C(i, j), of which only the part inside C and its wanted triangle is written.
template <class T>
static void clipped_tile(const GemmOf<T>& g, int64_t i, int64_t j, const float* a, const float* b, int64_t depth,
                         bool accumulate) {
    float tile[kTileRows * kTileColumns];
    multiply_panels(a, b, depth, tile, kTileColumns, g.sign, false);
    for (int64_t r = 0; r < kTileRows && i + r < g.m; ++r) {
        const int64_t from = g.part == Part::upper && i + r > j ? i + r - j : 0;
        const int64_t stop = g.part == Part::lower && i + r + 1 < g.n ? i + r + 1 - j : g.n - j;
        float* c = g.c + (i + r) * g.c_row + j;
        for (int64_t s = from; s < stop && s < kTileColumns; ++s)
            c[s] = accumulate ? c[s] + tile[r * kTileColumns + s] : tile[r * kTileColumns + s];
    }
}

// The register tiles at rows [i0, i1), columns [j0, j1), from depth [p0, p1) of the packed operands.
template <class T>
static void register_tiles(const GemmOf<T>& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t p0, int64_t p1,
                           const float* a, const float* b, bool accumulate) {
    const int64_t depth = p1 - p0;
    for (int64_t j = j0; j < j1; j += kTileColumns, b += kTileColumns * depth) {
        const float* as = a;
        for (int64_t i = i0; i < i1; i += kTileRows, as += kTileRows * depth) {
            const int64_t i_last = i + kTileRows - 1, j_last = j + kTileColumns - 1;
            if ((g.part == Part::upper && j_last < i) || (g.part == Part::lower && i_last < j)) continue;
            int64_t from = p0, to = p1;
            if (g.a_upper && from < i) from = i;
            if (g.b_lower && from < j) from = j;
            if (g.b_upper && to > j_last + 1) to = j_last + 1;
            if (from >= to) {
                if (accumulate) continue;
                from = to = p0;
            }
            const float *at = as + (from - p0) * kTileRows, *bt = b + (from - p0) * kTileColumns;
            const bool inside = i_last < g.m && j_last < g.n && (g.part != Part::upper || i_last <= j) &&
                                (g.part != Part::lower || j_last <= i);
            if (inside)
                multiply_panels(at, bt, to - from, g.c + i * g.c_row + j, g.c_row, g.sign, accumulate);
            else
                clipped_tile(g, i, j, at, bt, to - from, accumulate);
        }
    }
}
