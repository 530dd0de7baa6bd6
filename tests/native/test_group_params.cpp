#include "native.h"

namespace native {

namespace {

struct Range {
    double low, high;
};

Range range_of(const float* group, int64_t count, bool symmetric) {
    Range range = {0, 0};
    for (int64_t i = 0; i < count; ++i) {
        range.low = std::min(range.low, static_cast<double>(group[i]));
        range.high = std::max(range.high, static_cast<double>(group[i]));
    }
    if (symmetric) range.high = std::max(range.high, -range.low), range.low = -range.high;
    return range;
}

double squared_error(const float* group, int64_t count, const float* importance, double scale, double zero, int bits) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double code = std::min(std::max(std::nearbyint(group[i] / scale) + zero, 0.0), std::ldexp(1, bits) - 1);
        const double d = (code - zero) * scale - group[i];
        sum += d * d * (importance ? importance[i] : 1.0);
    }
    return sum;
}

void check(Report& report, Isa isa, Random& random, int64_t n, int64_t k, int64_t group_size,
           const normtweak::GridRule& rule, bool weighted) {
    const std::vector<float> weight = random.normals(n * k, 0.02);
    std::vector<float> importance = random.normals(k);
    for (float& v : importance) v *= v;
    const size_t count = static_cast<size_t>(n * (k / group_size));
    std::vector<float> scales(count, NAN);
    std::vector<uint8_t> zeros(count, 255);
    const float* cost = weighted ? importance.data() : nullptr;
    normtweak::group_params(isa, 2, {weight.data(), cost, scales.data(), zeros.data(), n, k, group_size, rule});
    const double levels = std::ldexp(1, rule.bits) - 1;
    for (int64_t g = 0; g < k / group_size; ++g) {
        for (int64_t row = 0; row < n; ++row) {
            const float* group = weight.data() + row * k + g * group_size;
            const float* group_cost = cost ? cost + g * group_size : nullptr;
            const double scale = scales[g * n + row], zero = zeros[g * n + row];
            const Range range = range_of(group, group_size, rule.symmetric);
            report.holds(
                value_of(bits_near(scales[g * n + row], Dtype::float16), Dtype::float16) == scale || scale < 0x1p-14,
                "scale is a float16");
            if (rule.symmetric) report.near(zero, std::ldexp(1, rule.bits - 1), 0, "zero");
            const double whole = (range.high - range.low) / levels;
            if (rule.clip_steps == 0) {
                report.near(scale, whole, whole * 0x1p-10, "scale");
                if (!rule.symmetric) report.near(zero, -range.low / scale, 0.501, "zero");
                continue;
            }
            double best = std::numeric_limits<double>::infinity();
            for (int64_t step = 0; step <= rule.clip_steps; ++step) {
                const double factor =
                    1 - static_cast<double>(step) * (1 - rule.min_clip) / static_cast<double>(rule.clip_steps);
                // float16's rounding, half to even, of a number in its normal range
                const double unit = std::ldexp(1, std::ilogb(whole * factor) - 10);
                const double s = std::nearbyint(whole * factor / unit) * unit;
                const double z =
                    rule.symmetric ? zero : std::min(std::max(std::nearbyint(-range.low * factor / s), 0.0), levels);
                best = std::min(best, squared_error(group, group_size, group_cost, s, z, rule.bits));
            }
            // A step that float32 puts to the other side of a tie may cost a little.
            report.near(squared_error(group, group_size, group_cost, scale, zero, rule.bits), best, 0.01 * best,
                        "squared error of the best grid");
        }
    }
}

}  // namespace

bool test_group_params(Isa isa) {
    Random random;
    Report report("group_params", isa);
    for (const int bits : {2, 3, 4, 8}) {
        for (const bool symmetric : {false, true}) {
            check(report, isa, random, 1, 8, 8, {bits, symmetric, 0, 0.28}, false);
            check(report, isa, random, 37, 96, 32, {bits, symmetric, 0, 0.28}, false);
            check(report, isa, random, 21, 130, 65, {bits, symmetric, 10, 0.28}, false);
            check(report, isa, random, 16, 64, 64, {bits, symmetric, 7, 0.5}, true);
        }
    }
    return report.finish();
}

}  // namespace native
