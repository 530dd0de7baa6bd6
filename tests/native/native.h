// What the kernels' native tests share: random data, conversions, and the count of mismatches. These tests need neither
// Python nor torch, so that they also run where those don't: under an emulator or a sanitizer.
//
// Every buffer is an allocation of its exact size, which lets AddressSanitizer see each access past it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/packing.h"

namespace native {

using normtweak::Dtype;
using normtweak::Isa;

// Draws the same numbers everywhere: the standard fixes the engine's output, but no distribution's.
class Random {
  public:
    double uniform() { return static_cast<double>(engine_()) / 4294967296.0; }
    int64_t below(int64_t bound) { return static_cast<int64_t>(uniform() * static_cast<double>(bound)); }
    double normal() {
        double sum = -6.0;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }
    std::vector<float> normals(int64_t count, double scale = 1.0, double mean = 0.0) {
        std::vector<float> values(static_cast<size_t>(count));
        for (float& v : values) v = static_cast<float>(normal() * scale + mean);
        return values;
    }

  private:
    std::mt19937 engine_{1};
};

// Counts what is wrong in one group of cases and prints the first of it.
class Report {
  public:
    Report(std::string op, Isa isa) : op_(std::move(op)), isa_(normtweak::isa_name(isa)) {}

    // `got` differs from `wanted` by at most `tolerance`; NaN is never near anything.
    void near(double got, double wanted, double tolerance, const char* what) {
        ++checks_;
        if (std::abs(got - wanted) <= tolerance) return;
        if (failures_++ < 3) {
            std::printf("%s %s: %s is %.9g, wanted %.9g within %.3g\n", op_.c_str(), isa_, what, got, wanted,
                        tolerance);
        }
    }
    void holds(bool condition, const char* what) { near(condition ? 1 : 0, 1, 0, what); }

    // Whether all went well; prints one line.
    bool finish() const {
        std::printf("%-20s %-9s %8lld checks, %lld wrong\n", op_.c_str(), isa_, static_cast<long long>(checks_),
                    static_cast<long long>(failures_));
        return failures_ == 0 && checks_ > 0;
    }

  private:
    std::string op_;
    const char* isa_;
    int64_t checks_ = 0, failures_ = 0;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The value of 16 bits in either format, by the definition of its fields.
inline double value_of(uint16_t bits, Dtype dtype) {
    if (dtype == Dtype::bfloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double magnitude =
        exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);  // finite only
    return bits & 0x8000 ? -magnitude : magnitude;
}

// A finite value's bits, cut off: any representable number near it will do as test data.
inline uint16_t bits_near(float value, Dtype dtype) {
    const uint32_t u = to_bits(value);
    if (dtype == Dtype::bfloat16) return static_cast<uint16_t>(u >> 16);
    const int exponent = static_cast<int>((u >> 23) & 255) - 112;
    const uint32_t sign = (u >> 16) & 0x8000;
    if (exponent <= 0) return static_cast<uint16_t>(sign);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | ((u >> 13) & 1023));
}

// The relative distance of neighbouring numbers, at most.
inline double unit_of(Dtype dtype) {
    return dtype == Dtype::float32 ? 0x1p-23 : dtype == Dtype::bfloat16 ? 0x1p-7 : 0x1p-10;
}

// One test per op; each gives whether all its checks held.
bool test_group_params(Isa isa);
bool test_gptq_block_update(Isa isa);
bool test_channel_loss(Isa isa);
bool test_dequant_gemm(Isa isa);
bool test_hessian(Isa isa);

}  // namespace native
