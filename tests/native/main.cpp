// Runs every kernel of csrc/cpu through kernels.h, for every instruction set of this processor, against plain loops in
// double. Exits with 1 when anything is wrong.
#include "native.h"

int main() {
    bool good = true;
    for (const std::string& name : normtweak::available_isas()) {
        normtweak::set_isa(name);
        const normtweak::Isa isa = normtweak::current_isa();
        good &= native::test_group_params(isa);
        good &= native::test_gptq_block_update(isa);
        good &= native::test_channel_loss(isa);
        good &= native::test_dequant_gemm(isa);
        good &= native::test_hessian(isa);
    }
    return good ? 0 : 1;
}
