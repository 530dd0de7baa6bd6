#include "grid_body.h"

// Rows [row, row + kLanes) of every group. columns: scratch [group_size][kLanes].
static void group_params_tile(const GroupParams& a, int64_t row, float* columns) {
    const int64_t valid = a.n - row < kLanes ? a.n - row : kLanes;
    for (int64_t group = 0; group < a.k / a.group_size; ++group) {
        const int64_t first = group * a.group_size;
        load_columns(a.weight + row * a.k + first, a.k, valid, a.group_size, columns);
        const Grid grid =
            find_grid(columns, kLanes, a.group_size, a.importance ? a.importance + first : nullptr, a.rule);
        store_valid(a.scales + group * a.n + row, grid.scale, valid);
        store_valid(a.zeros + group * a.n + row, grid.zero, valid);
    }
}
