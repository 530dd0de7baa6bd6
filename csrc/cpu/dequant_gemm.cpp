#include <algorithm>

#include "../packing.h"
#include "kernels.h"
#include "parallel.h"

#define NT_BODY "dequant_gemm_body.h"
#include "foreach_isa.h"

namespace normtweak {

void dequant_gemm_small(Isa isa, int threads, const PackedWeight& weight, const float* x, const float* bias, float* y,
                        int64_t m) {
    const auto block = NT_PICK(isa, gemm_block);
    parallel_parts(ceil_div(weight.n, kPackedLanes), threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) block(weight, i, x, bias, y, m);
    });
}

void dequantize_panel(Isa isa, int threads, const PackedWeight& weight, const Panel& panel) {
    // A block's row of 16-bit values is half a cache line: two blocks side by side fill lines while they are in the
    // first-level cache, which a few rows fit.
    constexpr int64_t kTogether = 2, kRows = 4 * kChunk;
    const auto block = NT_PICK(isa, panel_block);
    const int64_t blocks = ceil_div(panel.n1 - panel.n0, kPackedLanes);
    const int64_t row_bytes = panel.stride * (panel.dtype == Dtype::float32 ? 4 : 2);
    parallel_parts(ceil_div(blocks, kTogether), threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) {
            for (Panel rows = panel; rows.k0 < panel.k1; rows.k0 = rows.k1) {
                rows.k1 = std::min(rows.k0 + kRows, panel.k1);
                rows.out = static_cast<char*>(panel.out) + (rows.k0 - panel.k0) * row_bytes;
                for (int64_t i = pair * kTogether; i < std::min((pair + 1) * kTogether, blocks); ++i)
                    block(weight, rows, i);
            }
        }
    });
}

}  // namespace normtweak
