#include "../packing.h"
#include "kernels.h"
#include "parallel.h"

#define NT_BODY "group_params_body.h"
#include "foreach_isa.h"

namespace normtweak {

void group_params(Isa isa, int threads, const GroupParams& args) {
    const auto tile = NT_PICK(isa, group_params_tile);
    const int64_t lanes = isa_lanes(isa), scratch = args.group_size * lanes;
    std::vector<float> columns(static_cast<size_t>(scratch * threads));
    parallel_parts(ceil_div(args.n, lanes), threads, [&](int64_t part, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) tile(args, i * lanes, columns.data() + part * scratch);
    });
}

}  // namespace normtweak
