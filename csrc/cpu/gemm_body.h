// One tile of a product of float32 matrices. Included inside the bodies that need it.
#include "register_tiles.h"

// Rows, or columns, `first` to `first + count` of an operand, depths [p, p + depth).
template <int64_t WIDTH>
static void pack(const float* from, int64_t step, int64_t depth_step, int64_t first, int64_t count, int64_t p,
                 int64_t depth, float* panels) {
    if (step == 1)
        pack_rows<WIDTH>(from + p * depth_step + first, depth_step, count, depth, panels);
    else
        pack_columns<WIDTH>(from + first * step + p, step, count, depth, panels);
}

// Tile `tile` of C, counted along its rows.
static void gemm_tile(const Gemm& g, int64_t tile, float* scratch) {
    const int64_t across = (g.n + kGemmColumns - 1) / kGemmColumns;
    const int64_t i0 = tile / across * kGemmRows, j0 = tile % across * kGemmColumns;
    const int64_t i1 = i0 + kGemmRows < g.m ? i0 + kGemmRows : g.m;
    const int64_t j1 = j0 + kGemmColumns < g.n ? j0 + kGemmColumns : g.n;
    if ((g.part == Part::upper && j1 <= i0) || (g.part == Part::lower && i1 <= j0)) return;
    const int64_t from = g.a_upper ? i0 : g.b_lower ? j0 : 0, to = g.b_upper && j1 < g.k ? j1 : g.k;
    float *a = scratch, *b = scratch + kGemmRows * kGemmDepth;
    for (int64_t p = from; p < to; p += kGemmDepth) {
        const int64_t end = p + kGemmDepth < to ? p + kGemmDepth : to;
        pack<kTileRows>(g.a, g.a_row, g.a_column, i0, i1 - i0, p, end - p, a);
        pack<kTileColumns>(g.b, g.b_column, g.b_row, j0, j1 - j0, p, end - p, b);
        register_tiles(g, i0, i1, j0, j1, p, end, a, b, g.accumulate || p > from);
    }
}
