#include <atomic>
#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "../check.h"
#include "kernels.h"

namespace normtweak {

namespace {

constexpr const char* kEnvironment = "NORMTWEAK_ISA";

struct Entry {
    Isa isa;
    const char* name;
    int lanes;
    bool (*supported)();
    bool emulated = false;
};

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and f16c, which every such processor has
}
bool has_avx2_vnni() {
    constexpr unsigned kAvxVnni = 1u << 4;  // by cpuid itself, as not every compiler knows its name
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

// Whether the processor has AMX and the system keeps its tiles; by cpuid itself, as not every compiler knows its names.
bool has_amx_bits(unsigned wanted) {
    constexpr unsigned kXgetbv = 1u << 27, kTileStates = 3u << 17;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kXgetbv)) return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & wanted) != wanted) return false;
    asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & kTileStates) == kTileStates;
}

constexpr unsigned kAmxBfloat16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;

// Linux lets a process use tiles only after it asked, as its signal frames grow by them, and refuses where a signal
// stack is too small for that.
bool has_amx_tiles() {
#if defined(__linux__)
    static const bool permitted = [] {
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return has_avx512_vnni() && has_amx_bits(kAmxTile | kAmxInt8 | kAmxBfloat16) &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return permitted;
#else
    return false;
#endif
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every 64-bit ARM processor that Apple sells as a computer
#endif
}
#endif

// Slowest first; the last that the processor itself supports is the best.
constexpr Entry kEntries[] = {
    {Isa::portable, "portable", 4, [] { return true; }},
#if defined(__x86_64__)
    {Isa::avx2, "avx2", 8, has_avx2},
    {Isa::avx2_vnni, "avx2_vnni", 8, has_avx2_vnni},
    {Isa::avx512, "avx512", 16, has_avx512},
    {Isa::avx512_vnni, "avx512_vnni", 16, has_avx512_vnni},
    {Isa::amx, "amx", 16, has_amx_tiles},
    {Isa::amx_emulated, "amx_emulated", 16, has_avx512_vnni, true},
#elif defined(__aarch64__)
    {Isa::dotprod, "dotprod", 4, has_dotprod},
#endif
};

const Entry& entry(Isa isa) {
    for (const Entry& e : kEntries)
        if (e.isa == isa) return e;
    return kEntries[0];
}

Isa best() {
    static const Isa isa = [] {
        Isa found = Isa::portable;
        for (const Entry& e : kEntries)
            // AMX only on request until its body, so far run with emulated tiles, has run on a processor that has it.
            if (!e.emulated && e.isa != Isa::amx && e.supported()) found = e.isa;
        return found;
    }();
    return isa;
}

Isa parse(const char* argument, const std::string& name) {
    std::string wanted;
    for (const Entry& e : kEntries) {
        if (!e.supported()) continue;
        if (name == e.name) return e.isa;
        if (!e.emulated) wanted += (wanted.empty() ? "" : ", ") + std::string(e.name);
    }
    check(false, "native kernels", argument, "one of " + wanted + " on this processor", name);
    return Isa::portable;
}

std::vector<std::string> isas(bool emulated) {
    std::vector<std::string> names;
    for (const Entry& e : kEntries)
        if (e.emulated == emulated && e.supported()) names.emplace_back(e.name);
    return names;
}

std::atomic<int> chosen{-1};

}  // namespace

Isa current_isa() {
    int isa = chosen;
    if (isa < 0) {
        const char* name = std::getenv(kEnvironment);
        chosen = isa = static_cast<int>(name && *name ? parse(kEnvironment, name) : best());
    }
    return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
    chosen = name.empty() ? -1 : static_cast<int>(parse("isa", name));
}

std::vector<std::string> available_isas() {
    return isas(false);
}

std::vector<std::string> emulated_isas() {
    return isas(true);
}

const char* isa_name(Isa isa) {
    return entry(isa).name;
}

// Both are asked for with every product, and a virtual machine answers cpuid in 10 to 30 microseconds.
bool has_amx() {
#if defined(__x86_64__)
    static const bool has = has_amx_bits(kAmxTile | kAmxBfloat16);
    return has;
#else
    return false;
#endif
}

bool has_bfloat16() {
#if defined(__x86_64__)
    static const bool has = has_amx() || __builtin_cpu_supports("avx512bf16") != 0;
    return has;
#else
    return false;
#endif
}

int isa_lanes(Isa isa) {
    return entry(isa).lanes;
}

}  // namespace normtweak
