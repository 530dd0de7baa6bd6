#include "native.h"

namespace native {

namespace {

struct Shape {
    int64_t n, k, groups, start, stop;
    bool indexed;  // static groups in any order, as with activation order
};

// Follows the recursion in double with the kernel's own codes and grids: each code must be the nearest one to the
// updated weight, each error what is left of it.
void check(Report& report, Isa isa, Random& random, const Shape& s, int bits, bool symmetric) {
    const std::vector<float> before = random.normals(s.n * s.k);
    std::vector<float> weight = before, hinv(static_cast<size_t>(s.k * s.k), NAN);
    for (int64_t i = 0; i < s.k; ++i)  // below the diagonal nothing may be read
        for (int64_t j = i; j < s.k; ++j)
            hinv[i * s.k + j] = static_cast<float>(i == j ? 1 + random.uniform() : random.normal() * 0.1);
    std::vector<uint8_t> codes(weight.size(), 255), zeros(static_cast<size_t>(s.groups * s.n), 255);
    std::vector<float> scales(zeros.size(), NAN), errors(static_cast<size_t>((s.stop - s.start) * s.n), NAN);
    std::vector<int32_t> index(static_cast<size_t>(s.k));
    for (int32_t& g : index) g = static_cast<int32_t>(random.below(s.groups));
    if (s.indexed) {
        for (float& v : scales) v = static_cast<float>(0.2 + random.uniform() * 0.5);
        for (uint8_t& v : zeros) v = static_cast<uint8_t>(random.below(int64_t{1} << bits));
    }
    normtweak::gptq_block_update(
        isa, 2,
        {weight.data(), hinv.data(), codes.data(), scales.data(), zeros.data(), s.indexed ? index.data() : nullptr,
         errors.data(), s.n, s.k, s.groups, s.start, s.stop, normtweak::GridRule{bits, symmetric, 0, 0.28}});
    const double top = std::ldexp(1, bits) - 1;
    std::vector<double> w(static_cast<size_t>(s.stop));
    for (int64_t row = 0; row < s.n; ++row) {
        for (int64_t j = 0; j < s.k; ++j) {
            const size_t at = static_cast<size_t>(row * s.k + j);
            if (j < s.start || j >= s.stop) report.near(weight[at], before[at], 0, "weight outside the block");
            if (j < s.stop) w[j] = before[at];
        }
        for (int64_t j = s.start; j < s.stop; ++j) {
            const size_t at = static_cast<size_t>(row * s.k + j);
            const int64_t group = s.indexed ? index[j] : j / (s.k / s.groups);
            const double scale = scales[group * s.n + row], zero = zeros[group * s.n + row], code = codes[at];
            const double nearest = std::min(std::max(w[j] / scale, -zero), top - zero);
            report.near(code - zero, nearest, 0.501, "code");
            report.near(weight[at], (code - zero) * scale, std::abs(weight[at]) * 0x1p-23, "quantized weight");
            const double error = (w[j] - (code - zero) * scale) / hinv[j * s.k + j];
            report.near(errors[(j - s.start) * s.n + row], error, 1e-4, "error");
            for (int64_t c = j + 1; c < s.stop; ++c) w[c] -= error * hinv[j * s.k + c];
        }
    }
}

}  // namespace

bool test_gptq_block_update(Isa isa) {
    Random random;
    Report report("gptq_block_update", isa);
    const Shape shapes[] = {{1, 8, 1, 0, 8, false},      {37, 96, 3, 32, 96, false}, {16, 64, 1, 0, 64, false},
                            {19, 100, 5, 20, 60, false}, {37, 70, 7, 5, 69, true},   {5, 128, 2, 0, 128, true}};
    for (const int bits : {2, 3, 4, 8})
        for (const bool symmetric : {false, true})
            for (const Shape& shape : shapes) check(report, isa, random, shape, bits, symmetric);
    return report.finish();
}

}  // namespace native
