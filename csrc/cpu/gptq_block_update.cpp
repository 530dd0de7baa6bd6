#include "../packing.h"
#include "kernels.h"
#include "parallel.h"

#define NT_BODY "gptq_block_update_body.h"
#include "foreach_isa.h"

namespace normtweak {

void gptq_block_update(Isa isa, int threads, const GptqBlock& args) {
    const auto tile = NT_PICK(isa, gptq_tile);
    const int64_t lanes = isa_lanes(isa), scratch = 2 * (args.stop - args.start) * lanes;
    std::vector<float> buffer(static_cast<size_t>(scratch * threads));
    parallel_parts(ceil_div(args.n, lanes), threads, [&](int64_t part, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) tile(args, i * lanes, buffer.data() + part * scratch);
    });
}

}  // namespace normtweak
