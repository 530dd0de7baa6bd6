#include <atomic>
#include <cstdlib>

#include "../check.h"
#include "kernels.h"

namespace normtweak {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
constexpr const char* kEnvironment = "NORMTWEAK_ISA";

Isa detect() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Isa::avx2;
#endif
    return Isa::portable;
}

Isa best() {
    static const Isa isa = detect();
    return isa;
}

Isa parse(const char* argument, const std::string& name) {
    std::string wanted;
    for (int i = 0; i <= static_cast<int>(best()); ++i) {
        if (name == kNames[i]) return static_cast<Isa>(i);
        wanted += (i ? ", " : "") + std::string(kNames[i]);
    }
    check(false, "native kernels", argument, "one of " + wanted + " on this processor", name);
    return Isa::portable;
}

std::atomic<int> chosen{-1};

}  // namespace

Isa current_isa() {
    if (chosen < 0) {
        const char* name = std::getenv(kEnvironment);
        chosen = static_cast<int>(name && *name ? parse(kEnvironment, name) : best());
    }
    return static_cast<Isa>(chosen.load());
}

void set_isa(const std::string& name) {
    chosen = name.empty() ? -1 : static_cast<int>(parse("isa", name));
}

std::vector<std::string> available_isas() {
    return {kNames, kNames + static_cast<int>(best()) + 1};
}

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

int isa_lanes(Isa isa) {
    return isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
}

}  // namespace normtweak
