#include "gemm.h"
#include "kernels.h"

#define NT_BODY "gemm_body.h"
#include "foreach_isa.h"

#if defined(__x86_64__)
#define NT_LANES 16
#define NT_BFLOAT16_PAIRS
#include "isa_begin.h"
namespace normtweak::avx512_bfloat16 {
#include "lanes.h"

#include "hessian_bfloat16_body.h"
}  // namespace normtweak::avx512_bfloat16
#include "isa_end.h"
#undef NT_BFLOAT16_PAIRS
#undef NT_LANES
#endif

namespace normtweak {

namespace {

// H's lower triangle += X^T X: C(i, j) sums x[t, i] x[t, j].
template <class T>
GemmOf<T> lower_products(const void* x, float* hessian, int64_t tokens, int64_t channels) {
    const auto* values = static_cast<const T*>(x);
    GemmOf<T> product = {values, 1, channels, values, channels, 1, hessian, channels, channels, channels, tokens};
    product.accumulate = true;
    product.part = Part::lower;
    return product;
}

}  // namespace

// AMD's processors multiply pairs of bfloat16 at the rate of float32 multiply-adds, twice the products; Intel's
// (measured on Sapphire Rapids) at half of it, which gains nothing, and have AMX.
bool hessian_bfloat16(Isa isa) {
#if defined(__x86_64__)
    return isa >= Isa::avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
    static_cast<void>(isa);
    return false;
#endif
}

void hessian_update(Isa isa, int threads, const void* x, [[maybe_unused]] Dtype dtype, float* hessian, int64_t tokens,
                    int64_t channels) {
    const Scratch scratch(kGemmScratch * threads);
#if defined(__x86_64__)
    if (dtype == Dtype::bfloat16) {
        gemm(avx512_bfloat16::gemm_tile, threads, lower_products<uint16_t>(x, hessian, tokens, channels),
             scratch.get());
        return;
    }
#endif
    gemm(NT_PICK(isa, gemm_tile), threads, lower_products<float>(x, hessian, tokens, channels), scratch.get());
}

}  // namespace normtweak
