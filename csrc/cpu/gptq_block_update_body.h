#include "grid_body.h"
#include "register_tiles.h"

// A tile of rows is solved by itself: no row's errors reach another one. It lies in panels of kTileColumns rows,
// columns one after the other, padded by a register tile.
struct GptqTile {
    const GptqBlock* args;
    int64_t row, panels, panel_stride;
    float *work, *packed;
};

NT_INLINE float* column_at(const GptqTile& t, int64_t panel, int64_t column) {
    return t.work + panel * t.panel_stride + (column - t.args->start) * kTileColumns;
}

// The grid of a column for rows [row, row + kLanes); any where there are none.
NT_INLINE Grid column_grid(const GptqBlock& a, int64_t column, int64_t row) {
    const int64_t group =
        a.group_index ? a.group_index[column] : (a.order ? a.order[column] : column) / (a.k / a.groups);
    const float* scales = a.scales + group * a.n + row;
    const uint8_t* zeros = a.zeros + group * a.n + row;
    if (row + kLanes <= a.n) return {load<vf>(scales), to_float(load<vb>(zeros))};
    Grid grid = {splat(1.0f), vf{}};
    for (int64_t lane = 0; row + lane < a.n; ++lane) {
        grid.scale[lane] = scales[lane];
        grid.zero[lane] = zeros[lane];
    }
    return grid;
}

static void find_group(const GptqTile& t, int64_t first) {
    const GptqBlock& a = *t.args;
    const int64_t group_size = a.k / a.groups, group = first / group_size;
    for (int64_t panel = 0; panel < t.panels; ++panel) {
        for (int64_t v = 0; v < kVectors; ++v) {
            const int64_t row = t.row + panel * kTileColumns + v * kLanes;
            const int64_t valid = a.n - row < kLanes ? a.n - row : kLanes;
            if (valid <= 0) return;
            const float* columns = column_at(t, panel, first) + v * kLanes;
            const Grid grid = find_grid(columns, kTileColumns, group_size, nullptr, a.rule);
            store_valid(a.scales + group * a.n + row, grid.scale, valid);
            store_valid(a.zeros + group * a.n + row, grid.zero, valid);
        }
    }
}

// Columns [first, last) of one panel, at most kGptqLeaf: quantize each and pass its error on to those after it. The
// errors take the columns' place, as the products that pass them on further need them there.
static void quantize_columns(const GptqTile& t, int64_t panel, int64_t first, int64_t last) {
    const GptqBlock& a = *t.args;
    const int64_t row = t.row + panel * kTileColumns, count = last - first;
    const float levels = static_cast<float>((1 << a.rule.bits) - 1);
    float* columns = column_at(t, panel, first);
    float quantized[kGptqLeaf * kTileColumns];
    int32_t codes[kGptqLeaf * kTileColumns];
    for (int64_t j = 0; j < count; ++j) {
        const float* h = a.hinv + (first + j) * a.k + first;
        vf errors[kVectors];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
            const int64_t at = j * kTileColumns + v * kLanes;
            const Grid grid = column_grid(a, first + j, row + v * kLanes);
            const vf w = load<vf>(columns + at), steps = steps_from_zero(w, grid, levels), q = steps * grid.scale;
            errors[v] = (w - q) / h[j];
            store(columns + at, errors[v]);
            store(quantized + at, q);
            store(codes + at, __builtin_convertvector(steps + grid.zero, vi));
        }
        for (int64_t c = j + 1; c < count; ++c) {
#pragma GCC unroll 4
            for (int64_t v = 0; v < kVectors; ++v) {
                float* to = columns + c * kTileColumns + v * kLanes;
                store(to, load<vf>(to) - errors[v] * h[c]);
            }
        }
    }
    for (int64_t lane = 0; lane < kTileColumns && row + lane < a.n; ++lane) {
        uint8_t* to = a.codes + (row + lane) * a.k;
        for (int64_t c = 0; c < count; ++c)
            to[a.order ? a.order[first + c] : first + c] = static_cast<uint8_t>(codes[c * kTileColumns + lane]);
        if (a.updated) {
            float* values = a.updated + (row + lane) * a.k + first;
            for (int64_t c = 0; c < count; ++c) values[c] = quantized[c * kTileColumns + lane];
        }
    }
}

// Columns [to_first, to_last) less the errors of [first, last) times their part of hinv.
static void pass_on(const GptqTile& t, int64_t first, int64_t last, int64_t to_first, int64_t to_last) {
    const GptqBlock& a = *t.args;
    for (int64_t p = first; p < last; p += kGemmDepth) {
        const int64_t depth = last - p < kGemmDepth ? last - p : kGemmDepth;
        for (int64_t c = to_first; c < to_last; c += kGemmRows) {
            const int64_t count = to_last - c < kGemmRows ? to_last - c : kGemmRows;
            pack_rows<kTileRows>(a.hinv + p * a.k + c, a.k, count, depth, t.packed);
            for (int64_t panel = 0; panel < t.panels; ++panel) {
                // The last register tile may reach over to_last, with factors of zero.
                for (int64_t i = 0; i < count; i += kTileRows)
                    multiply_panels(t.packed + i * depth, column_at(t, panel, p), depth, column_at(t, panel, c + i),
                                    kTileColumns, -1.0f, true);
            }
        }
    }
}

// Columns [first, last), by halves: the first half's errors reach the second in one product, so that few of the
// products are thin. Groups whose grids are found here are split only after that, when all their columns are up to
// date.
static void solve_columns(const GptqTile& t, int64_t first, int64_t last) {
    const GptqBlock& a = *t.args;
    int64_t unit = kGptqLeaf;
    if (a.find_grids) {
        const int64_t group_size = a.k / a.groups;
        if (last - first > group_size)
            unit = group_size;
        else if (last - first == group_size)
            find_group(t, first);
    }
    const int64_t units = (last - first + unit - 1) / unit;
    if (units == 1) {
        for (int64_t panel = 0; panel < t.panels; ++panel) quantize_columns(t, panel, first, last);
        return;
    }
    const int64_t middle = first + (units + 1) / 2 * unit;
    solve_columns(t, first, middle);
    pass_on(t, first, middle, middle, last);
    solve_columns(t, middle, last);
}

// `valid` rows -> columns [width][kTileColumns], in the order given; zero in the lanes past `valid`.
static void load_ordered(const float* rows, int64_t stride, int64_t valid, const int64_t* order, int64_t width,
                         float* columns) {
    for (int64_t c = 0; c < width; ++c)
        for (int64_t lane = 0; lane < kTileColumns; ++lane)
            columns[c * kTileColumns + lane] = lane < valid ? rows[lane * stride + order[c]] : 0.0f;
}

// Panels [begin, end) of all rows. scratch: the panels, then kGemmRows * kGemmDepth.
static void gptq_tile(const GptqBlock& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t width = a.k - a.start;
    GptqTile t = {&a, begin * kTileColumns, end - begin, (width + kTileRows) * kTileColumns, scratch, nullptr};
    t.packed = scratch + t.panels * t.panel_stride;
    for (int64_t panel = 0; panel < t.panels; ++panel) {
        const int64_t row = t.row + panel * kTileColumns, left = a.n - row;
        const int64_t valid = left < kTileColumns ? left : kTileColumns;
        const float* rows = a.weight + row * a.k;
        if (a.order)
            load_ordered(rows, a.k, valid, a.order + a.start, width, column_at(t, panel, a.start));
        else
            pack_columns<kTileColumns>(rows + a.start, a.k, valid, width, column_at(t, panel, a.start));
    }
    solve_columns(t, a.start, a.stop);
    if (a.stop == a.k || !a.updated) return;
    pass_on(t, a.start, a.stop, a.stop, a.k);
    for (int64_t panel = 0; panel < t.panels; ++panel) {
        const int64_t row = t.row + panel * kTileColumns;
        for (int64_t lane = 0; lane < kTileColumns && row + lane < a.n; ++lane)
            for (int64_t c = a.stop; c < a.k; ++c) a.updated[(row + lane) * a.k + c] = column_at(t, panel, c)[lane];
    }
}
