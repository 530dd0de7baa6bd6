// Finds the affine grids of kLanes rows at once; affine.py's `grid` is the definition. Included inside the bodies that
// need it.

// Columns summed in float32 before the partial sum is added to the total, so that long groups keep their precision.
static constexpr int64_t kPartialSum = 64;

struct Grid {
    vf scale, zero;
};

NT_INLINE Grid grid_at(vf low, vf high, float factor, const GridRule& rule) {
    const float levels = static_cast<float>((1 << rule.bits) - 1);
    Grid grid;
    grid.scale = round_to_half(min(max((high - low) * factor / levels, splat(0x1p-24f)), splat(65504.0f)));
    if (rule.symmetric) {
        grid.zero = splat(static_cast<float>(1 << (rule.bits - 1)));
    } else {
        grid.zero = round_even(min(max(-low * factor / grid.scale, vf{}), splat(levels)));
    }
    return grid;
}

// round(w / scale), limited to what the codes can hold: code - zero. The bounds are integers, so limiting comes first.
NT_INLINE vf steps_from_zero(vf w, const Grid& grid, float levels) {
    return round_even(min(max(w / grid.scale, -grid.zero), levels - grid.zero));
}

static vf squared_error(const float* columns, int64_t stride, int64_t count, const float* importance, const Grid& grid,
                        float levels) {
    vf total = {};
    for (int64_t first = 0; first < count; first += kPartialSum) {
        const int64_t last = first + kPartialSum < count ? first + kPartialSum : count;
        vf sum = {};
        for (int64_t c = first; c < last; ++c) {
            const vf w = load<vf>(columns + c * stride);
            const vf d = steps_from_zero(w, grid, levels) * grid.scale - w;
            sum += importance ? d * d * importance[c] : d * d;
        }
        total += sum;
    }
    return total;
}

// columns: kLanes rows of column c at columns + c * stride.
static Grid find_grid(const float* columns, int64_t stride, int64_t count, const float* importance,
                      const GridRule& rule) {
    vf low = {}, high = {};
    for (int64_t c = 0; c < count; ++c) {
        const vf w = load<vf>(columns + c * stride);
        low = min(low, w);
        high = max(high, w);
    }
    if (rule.symmetric) {
        high = max(high, -low);
        low = -high;
    }
    Grid best = grid_at(low, high, 1.0f, rule);
    if (rule.clip_steps == 0) return best;
    const float levels = static_cast<float>((1 << rule.bits) - 1);
    vf best_error = squared_error(columns, stride, count, importance, best, levels);
    for (int64_t step = 1; step <= rule.clip_steps; ++step) {
        const double factor =
            1.0 - static_cast<double>(step) * (1.0 - rule.min_clip) / static_cast<double>(rule.clip_steps);
        const Grid grid = grid_at(low, high, static_cast<float>(factor), rule);
        const vf error = squared_error(columns, stride, count, importance, grid, levels);
        const auto better = error < best_error;
        best_error = better ? error : best_error;
        best.scale = better ? grid.scale : best.scale;
        best.zero = better ? grid.zero : best.zero;
    }
    return best;
}
