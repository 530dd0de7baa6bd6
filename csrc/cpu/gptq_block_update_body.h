#include "grid_body.h"

// Columns whose errors are passed on one by one; columns after them get the errors of all at once, from registers.
static constexpr int64_t kEager = 32;

// The grid of one column, read from static groups.
NT_INLINE Grid static_grid(const GptqBlock& a, int64_t group, int64_t row, int64_t valid) {
    const float* scales = a.scales + group * a.n + row;
    const uint8_t* zeros = a.zeros + group * a.n + row;
    if (valid == kLanes) return {load<vf>(scales), to_float(load<vb>(zeros))};
    Grid grid = {splat(1.0f), vf{}};
    for (int64_t lane = 0; lane < valid; ++lane) {
        grid.scale[lane] = scales[lane];
        grid.zero[lane] = zeros[lane];
    }
    return grid;
}

// Columns [first, last): quantize each and pass its error on to the columns up to `last`.
static void quantize_columns(const GptqBlock& a, int64_t row, int64_t valid, int64_t first, int64_t last, Grid& grid,
                             float* block, float* errors) {
    const int64_t group_size = a.k / a.groups;
    const float levels = static_cast<float>((1 << a.rule.bits) - 1);
    for (int64_t j = first; j < last; ++j) {
        const int64_t column = a.start + j;
        if (a.group_index) {
            grid = static_grid(a, a.group_index[column], row, valid);
        } else if (column % group_size == 0) {
            grid = find_grid(block + j * kLanes, group_size, nullptr, a.rule);
            store_valid(a.scales + column / group_size * a.n + row, grid.scale, valid);
            store_valid(a.zeros + column / group_size * a.n + row, grid.zero, valid);
        }
        const float* h = a.hinv + column * a.k + a.start;
        const vf w = load<vf>(block + j * kLanes);
        const vf steps = steps_from_zero(w, grid, levels);
        const vf quantized = steps * grid.scale;
        const vf error = (w - quantized) / h[j];
        store(block + j * kLanes, quantized);
        store(errors + j * kLanes, error);
        store_valid(a.errors + j * a.n + row, error, valid);
        for (int64_t lane = 0; lane < valid; ++lane)
            a.codes[(row + lane) * a.k + column] = static_cast<uint8_t>((steps + grid.zero)[lane]);
        for (int64_t c = j + 1; c < last; ++c) store(block + c * kLanes, load<vf>(block + c * kLanes) - error * h[c]);
    }
}

// Rows [row, row + kLanes). scratch: [2][stop - start][kLanes], the block's columns and their errors.
static void gptq_tile(const GptqBlock& a, int64_t row, float* scratch) {
    const int64_t valid = a.n - row < kLanes ? a.n - row : kLanes, width = a.stop - a.start,
                  group_size = a.k / a.groups;
    float* block = scratch;
    float* errors = scratch + width * kLanes;
    float* rows = a.weight + row * a.k + a.start;
    load_columns(rows, a.k, valid, width, block);
    Grid grid = {splat(1.0f), vf{}};
    for (int64_t first = 0, last = 0; first < width; first = last) {
        last = first + kEager < width ? first + kEager : width;
        if (!a.group_index) {
            // A group's grid needs all of its columns up to date: a run ends where a group does.
            const int64_t group_end = ((a.start + first) / group_size + 1) * group_size - a.start;
            last = last < group_end ? last : group_end;
        }
        quantize_columns(a, row, valid, first, last, grid, block, errors);
        for (int64_t c = last; c < width; ++c) {
            vf w = load<vf>(block + c * kLanes);
            const float* h = a.hinv + (a.start + first) * a.k + a.start + c;
            for (int64_t j = first; j < last; ++j, h += a.k) w -= load<vf>(errors + j * kLanes) * *h;
            store(block + c * kLanes, w);
        }
    }
    for (int64_t lane = 0; lane < valid; ++lane)
        for (int64_t c = 0; c < width; ++c) rows[lane * a.k + c] = block[c * kLanes + lane];
}
