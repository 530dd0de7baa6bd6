// Sixteen rows of the weight are the packed lanes; vectors of kLanes rows walk along K, and x is broadcast.

#include "row_grid_body.h"

// Codes whose products are summed in float32 before the scale is applied, so that long groups keep their precision.
static constexpr int64_t kRun = 64;

template <int BITS>
NT_INLINE vi code(const vi* words, int row, int byte) {
    constexpr int kWidth = BITS == 3 ? 2 : BITS;
    const Slot low = low_slot(BITS, row, byte);
    const vi value = (words[low.word] >> low.shift) & ((1 << kWidth) - 1);
    if constexpr (BITS == 3) {
        const Slot high = high_slot(row, byte);
        return value | (((words[high.word] >> high.shift) & 1) << 2);
    }
    return value;
}

template <int BITS>
NT_INLINE void load_words(const PackedWeight& w, int64_t n, int64_t chunk, vi* words) {
    const int64_t chunks = ceil_div(w.k, kChunk);
    const int32_t* p = w.words + (n / kPackedLanes * chunks + chunk) * BITS * kPackedLanes + n % kPackedLanes;
    for (int i = 0; i < BITS; ++i) words[i] = load<vi>(p + i * kPackedLanes);
}

// sums[i] += the products of rows [n, n + kLanes) with M rows of x. Chunks must not straddle groups.
template <int BITS, int M>
NT_INLINE void whole_chunks(const PackedWeight& w, int64_t n, const float* x, int64_t stride, vf* sums) {
    const int64_t chunks = ceil_div(w.k, kChunk), per_group = w.groups == 1 ? chunks : w.k / w.groups / kChunk;
    for (int64_t group = 0; group < w.groups; ++group) {
        const RowGrid grid = row_grid(w, group, n);
        const int64_t stop = (group + 1) * per_group;
        for (int64_t first = group * per_group; first < stop; first += kRun / kChunk) {
            const int64_t last = first + kRun / kChunk < stop ? first + kRun / kChunk : stop;
            // Two sums each: a chain of dependent additions is bound by their latency.
            vf even[M] = {}, odd[M] = {};
            for (int64_t chunk = first; chunk < last; ++chunk) {
                vi words[BITS];
                load_words<BITS>(w, n, chunk, words);
                const float* xs = x + chunk * kChunk;
#pragma GCC unroll 8
                for (int row = 0; row < 8; ++row) {
#pragma GCC unroll 4
                    for (int byte = 0; byte < 4; ++byte) {
                        const vf value = to_float(code<BITS>(words, row, byte) - grid.zero);
                        vf* sum = byte % 2 ? odd : even;
#pragma GCC unroll 4
                        for (int i = 0; i < M; ++i) sum[i] += value * xs[i * stride + 4 * row + byte];
                    }
                }
            }
            for (int i = 0; i < M; ++i) sums[i] += (even[i] + odd[i]) * grid.scale;
        }
    }
}

// The same for groups that end inside a chunk.
template <int BITS, int M>
NT_INLINE void straddled_chunks(const PackedWeight& w, int64_t n, const float* x, int64_t stride, vf* sums) {
    const int64_t group_size = w.k / w.groups;
    RowGrid grid = {};
    vf partial[M] = {};
    vi words[BITS];
#pragma GCC unroll 1
    for (int64_t k = 0; k < w.k; ++k) {
        if (k % kChunk == 0) load_words<BITS>(w, n, k / kChunk, words);
        if (k % group_size == 0) {
            for (int i = 0; i < M; ++i) sums[i] += partial[i] * grid.scale;
            for (int i = 0; i < M; ++i) partial[i] = vf{};
            grid = row_grid(w, k / group_size, n);
        }
        const int in_chunk = static_cast<int>(k % kChunk);
        const vf value = to_float(code<BITS>(words, in_chunk / 4, in_chunk % 4) - grid.zero);
        for (int i = 0; i < M; ++i) partial[i] += value * x[i * stride + k];
    }
    for (int i = 0; i < M; ++i) sums[i] += partial[i] * grid.scale;
}

template <int BITS, int M>
static void rows_of_x(const PackedWeight& w, int64_t n, const float* x, const float* bias, float* y) {
    const int64_t stride = ceil_div(w.k, kChunk) * kChunk;
    vf sums[M] = {};
    if (w.groups == 1 || w.k / w.groups % kChunk == 0)
        whole_chunks<BITS, M>(w, n, x, stride, sums);
    else
        straddled_chunks<BITS, M>(w, n, x, stride, sums);
    const int64_t valid = w.n - n < kLanes ? w.n - n : kLanes;
    for (int i = 0; i < M; ++i) {
        if (bias) {
            for (int64_t lane = 0; lane < valid; ++lane) sums[i][lane] += bias[n + lane];
        }
        store_valid(y + i * w.n + n, sums[i], valid);
    }
}

template <int BITS>
static void gemm_block_bits(const PackedWeight& w, int64_t n, const float* x, const float* bias, float* y, int64_t m) {
    const int64_t stride = ceil_div(w.k, kChunk) * kChunk;
    for (int64_t i = 0; i < m;) {
        const float* xs = x + i * stride;
        float* ys = y + i * w.n;
        const int64_t left = m - i;
        if (left >= 4)
            rows_of_x<BITS, 4>(w, n, xs, bias, ys), i += 4;
        else if (left >= 2)
            rows_of_x<BITS, 2>(w, n, xs, bias, ys), i += 2;
        else
            rows_of_x<BITS, 1>(w, n, xs, bias, ys), i += 1;
    }
}

// All m rows of y in the sixteen columns of one packed block.
static void gemm_block(const PackedWeight& w, int64_t block, const float* x, const float* bias, float* y, int64_t m) {
    for (int64_t n = block * kPackedLanes; n < (block + 1) * kPackedLanes && n < w.n; n += kLanes) {
        if (w.bits == 2)
            gemm_block_bits<2>(w, n, x, bias, y, m);
        else if (w.bits == 3)
            gemm_block_bits<3>(w, n, x, bias, y, m);
        else if (w.bits == 4)
            gemm_block_bits<4>(w, n, x, bias, y, m);
        else
            gemm_block_bits<8>(w, n, x, bias, y, m);
    }
}

NT_INLINE void store_weight(float* out, vf value) {
    store(out, value);
}
NT_INLINE void store_weight(uint16_t* out, vf value) {
    store(out, float_to_bfloat16(value));
}

template <int BITS, class T>
static void panel_lanes(const PackedWeight& w, const Panel& panel, int64_t n) {
    const int64_t group_size = w.k / w.groups, stride = panel.stride;
    int64_t group = panel.k0 / group_size, group_end = (group + 1) * group_size;
    RowGrid grid = row_grid(w, group, n);
    T* out = static_cast<T*>(panel.out) + n - panel.n0;
    for (int64_t first = panel.k0; first < panel.k1; first += kChunk, out += kChunk * stride) {
        vi words[BITS];
        load_words<BITS>(w, n, first / kChunk, words);
        if (first == group_end) {
            grid = row_grid(w, ++group, n);
            group_end += group_size;
        }
        if (first + kChunk <= panel.k1 && first + kChunk <= group_end) {
#pragma GCC unroll 32
            for (int i = 0; i < kChunk; ++i)
                store_weight(out + i * stride, to_float(code<BITS>(words, i / 4, i % 4) - grid.zero) * grid.scale);
            continue;
        }
        const int left = static_cast<int>(panel.k1 - first < kChunk ? panel.k1 - first : kChunk);
#pragma GCC unroll 1
        for (int i = 0; i < left; ++i) {
            if (first + i == group_end) {
                grid = row_grid(w, ++group, n);
                group_end += group_size;
            }
            store_weight(out + i * stride, to_float(code<BITS>(words, i / 4, i % 4) - grid.zero) * grid.scale);
        }
    }
}

template <int BITS>
static void panel_lanes_bits(const PackedWeight& w, const Panel& panel, int64_t n) {
    if (panel.dtype == Dtype::float32)
        panel_lanes<BITS, float>(w, panel, n);
    else
        panel_lanes<BITS, uint16_t>(w, panel, n);
}

// The panel's columns that belong to one packed block, counted from the panel's first.
static void panel_block(const PackedWeight& w, const Panel& panel, int64_t block) {
    const int64_t first = panel.n0 + block * kPackedLanes;
    for (int64_t n = first; n < first + kPackedLanes; n += kLanes) {
        if (w.bits == 2)
            panel_lanes_bits<2>(w, panel, n);
        else if (w.bits == 3)
            panel_lanes_bits<3>(w, panel, n);
        else if (w.bits == 4)
            panel_lanes_bits<4>(w, panel, n);
        else
            panel_lanes_bits<8>(w, panel, n);
    }
}
