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
    const auto block = NT_PICK(isa, panel_block);
    parallel_parts(ceil_div(panel.n1 - panel.n0, kPackedLanes), threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) block(weight, panel, i);
    });
}

}  // namespace normtweak
