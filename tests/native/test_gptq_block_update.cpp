#include "native.h"

namespace native {

namespace {

// With `ordered`, columns stand in any order, in static groups, as with activation order; else grids are found.
struct Shape {
    int64_t n, k, groups, start, stop;
    bool ordered;
};

// Follows the recursion in double with the kernel's own codes and grids: each code must be the nearest one to the
// updated weight, and what is left of it must reach the columns after it.
void check(Report& report, Isa isa, Random& random, const Shape& s, int bits, bool symmetric) {
    const std::vector<float> weight = random.normals(s.n * s.k);
    std::vector<float> updated(weight.size(), NAN), hinv(static_cast<size_t>(s.k * s.k), 0);
    for (int64_t i = 0; i < s.k; ++i)
        for (int64_t j = i; j < s.k; ++j)
            hinv[i * s.k + j] = static_cast<float>(i == j ? 1 + random.uniform() : random.normal() * 0.1);
    std::vector<uint8_t> codes(weight.size(), 255), zeros(static_cast<size_t>(s.groups * s.n), 255);
    std::vector<float> scales(zeros.size(), NAN);
    std::vector<int64_t> order(static_cast<size_t>(s.k));
    std::vector<int32_t> index(order.size());
    for (int64_t j = 0; j < s.k; ++j) order[j] = s.ordered ? s.k - 1 - j : j;
    for (int32_t& g : index) g = static_cast<int32_t>(random.below(s.groups));
    if (s.ordered) {
        for (float& v : scales) v = static_cast<float>(0.2 + random.uniform() * 0.5);
        for (uint8_t& v : zeros) v = static_cast<uint8_t>(random.below(int64_t{1} << bits));
    }
    normtweak::GptqBlock args = {};
    args.weight = weight.data();
    args.order = s.ordered ? order.data() : nullptr;
    args.hinv = hinv.data();
    args.codes = codes.data();
    args.scales = scales.data();
    args.zeros = zeros.data();
    args.group_index = s.ordered ? index.data() : nullptr;
    args.updated = s.ordered ? nullptr : updated.data();
    args.n = s.n, args.k = s.k, args.groups = s.groups, args.start = s.start, args.stop = s.stop;
    args.rule = {bits, symmetric, 0, 0.28};
    args.find_grids = !s.ordered;
    normtweak::gptq_block_update(isa, 2, args);

    const double top = std::ldexp(1, bits) - 1;
    std::vector<double> w(order.size());
    for (int64_t row = 0; row < s.n; ++row) {
        for (int64_t j = 0; j < s.k; ++j) w[j] = weight[row * s.k + order[j]];
        for (int64_t j = s.start; j < s.stop; ++j) {
            const int64_t group = s.ordered ? index[j] : j / (s.k / s.groups);
            const double scale = scales[group * s.n + row], zero = zeros[group * s.n + row];
            const double steps = codes[row * s.k + order[j]] - zero;
            report.near(steps, std::min(std::max(w[j] / scale, -zero), top - zero), 0.501, "code");
            const double error = (w[j] - steps * scale) / hinv[j * s.k + j];
            w[j] = steps * scale;
            for (int64_t c = j + 1; c < s.k; ++c) w[c] -= error * hinv[j * s.k + c];
        }
        for (int64_t j = s.start; j < s.k && !s.ordered; ++j)
            report.near(updated[row * s.k + j], w[j], 1e-4 + std::abs(w[j]) * 0x1p-21, "updated weight");
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
