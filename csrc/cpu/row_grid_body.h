struct RowGrid {
    vf scale;
    vi zero;
};

// Scale and zero of the rows [n, n + kLanes) of the weight in one group; lanes past the last row get scale 0.
NT_INLINE RowGrid row_grid(const PackedWeight& w, int64_t group, int64_t n) {
    const int64_t at = group * w.n + n, valid = w.n - n;
    const bool half = w.scale_dtype == Dtype::float16;
    RowGrid grid = {vf{}, (1 << (w.bits - 1)) - vi{}};
    if (valid >= kLanes) {
        grid.scale = half ? half_to_float(load<vh>(static_cast<const uint16_t*>(w.scales) + at))
                          : load<vf>(static_cast<const float*>(w.scales) + at);
        if (w.zeros) grid.zero = widen(load<vb>(w.zeros + at));
        return grid;
    }
    vh halves = {};
    for (int64_t lane = 0; lane < valid; ++lane) {
        if (half)
            halves[lane] = static_cast<const uint16_t*>(w.scales)[at + lane];
        else
            grid.scale[lane] = static_cast<const float*>(w.scales)[at + lane];
        if (w.zeros) grid.zero[lane] = w.zeros[at + lane];
    }
    if (half) grid.scale = half_to_float(halves);
    return grid;
}
