#include "../packing.h"
#include "kernels.h"
#include "parallel.h"

#define NT_BODY "repack_gptq_body.h"
#include "foreach_isa.h"

namespace normtweak {

namespace {

// Words along K that are moved together for four blocks of rows: whole cache lines are read from each row of GPTQ's
// layout, and what is written of a block stays in cache meanwhile.
constexpr int64_t kChunksTogether = 16, kBlocksTogether = 4;

}  // namespace

void repack_gptq(Isa isa, int threads, const Repack& a) {
    const auto move = NT_PICK(isa, move);
    const int64_t chunks = ceil_div(a.k, kChunk), blocks = ceil_div(a.n, kPackedLanes);
    parallel_parts(ceil_div(blocks, kBlocksTogether), threads, [&](int64_t, int64_t begin, int64_t end) {
        const int64_t last = std::min(end * kBlocksTogether, blocks);
        for (int64_t block = begin * kBlocksTogether; block < last; block += kBlocksTogether)
            for (int64_t chunk = 0; chunk < chunks; chunk += kChunksTogether)
                for (int64_t b = block; b < std::min(block + kBlocksTogether, last); ++b)
                    move(a, b, chunk, std::min(chunk + kChunksTogether, chunks));
    });
}

}  // namespace normtweak
