#include "gemm.h"
#include "kernels.h"

namespace normtweak {
// Columns whose errors are passed on one by one; above that, by products of matrices.
constexpr int64_t kGptqLeaf = 16;
// Rows of a tile: enough that its products are worth the packing of hinv, few enough that 4096 columns stay in a cache.
constexpr int64_t kGptqRows = 256;
}  // namespace normtweak

#define NT_BODY "gptq_block_update_body.h"
#include "foreach_isa.h"

namespace normtweak {

void gptq_block_update(Isa isa, int threads, const GptqBlock& args) {
    const auto tile = NT_PICK(isa, gptq_tile);
    const int64_t rows = NT_PICK(isa, kTileColumns), padded = args.k - args.start + NT_PICK(isa, kTileRows);
    const int64_t panels = ceil_div(args.n, rows), per_tile = std::min(ceil_div(panels, threads), kGptqRows / rows);
    const int64_t size = per_tile * rows * padded + kGemmRows * kGemmDepth;
    const Scratch scratch(size * threads);
    parallel_parts(panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += per_tile)
            tile(args, i, std::min(i + per_tile, end), scratch.get() + part * size);
    });
}

}  // namespace normtweak
