#include "native.h"

namespace native {

namespace {

void check_update(Report& report, Isa isa, Random& random, int64_t tokens, int64_t channels, Dtype dtype) {
    const std::vector<float> wide = random.normals(tokens * channels);
    std::vector<uint16_t> narrow;
    std::vector<double> x;
    for (const float v : wide) {
        narrow.push_back(bits_near(v, Dtype::bfloat16));
        x.push_back(dtype == Dtype::float32 ? v : value_of(narrow.back(), dtype));
    }
    const std::vector<float> before = random.normals(channels * channels);
    std::vector<float> hessian = before;
    const void* data = dtype == Dtype::float32 ? static_cast<const void*>(wide.data()) : narrow.data();
    normtweak::hessian_update(isa, 2, data, dtype, hessian.data(), tokens, channels);
    for (int64_t i = 0; i < channels; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            double sum = before[i * channels + j], size = std::abs(sum);
            for (int64_t t = 0; t < tokens; ++t) {
                const double product = x[t * channels + i] * x[t * channels + j];
                sum += product;
                size += std::abs(product);
            }
            report.near(hessian[i * channels + j], sum, 2e-6 * size, "sum of products");
        }
    }
}

// R^-1 H R^-T must be the identity.
void check_inverse(Report& report, Isa isa, Random& random, int64_t k, bool ordered) {
    const std::vector<float> x = random.normals(2 * k * k);
    std::vector<float> hessian(static_cast<size_t>(k * k)), damping(static_cast<size_t>(k)),
        factor(hessian.size(), NAN);
    for (int64_t i = 0; i < k; ++i) {
        damping[i] = static_cast<float>(0.5 + random.uniform());
        for (int64_t j = 0; j < k; ++j) {
            double sum = 0;
            for (int64_t t = 0; t < 2 * k; ++t) sum += static_cast<double>(x[t * k + i]) * x[t * k + j];
            hessian[i * k + j] = static_cast<float>(sum / static_cast<double>(k));
        }
    }
    std::vector<int64_t> order(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) order[i] = ordered ? k - 1 - i : i;
    const bool positive = normtweak::inverse_cholesky(
        isa, 2, {hessian.data(), damping.data(), ordered ? order.data() : nullptr, factor.data(), k});
    report.holds(positive, "Hessian is positive definite");
    if (!positive) return;
    std::vector<double> half(hessian.size(), 0);  // R^-1 H
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t m = 0; m < k; ++m) {
            if (m < i) report.near(factor[i * k + m], 0, 0, "factor below the diagonal");
            for (int64_t j = 0; j < k; ++j) {
                const double h = hessian[order[m] * k + order[j]] + (m == j ? damping[order[m]] : 0.0);
                half[i * k + j] += factor[i * k + m] * h;
            }
        }
    }
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) {
            double sum = 0;
            for (int64_t m = 0; m < k; ++m) sum += half[i * k + m] * factor[j * k + m];
            report.near(sum, i == j ? 1 : 0, 1e-4, "R^-1 H R^-T");
        }
    }
}

}  // namespace

bool test_hessian(Isa isa) {
    Random random;
    Report report("hessian", isa);
    const int64_t shapes[][2] = {{1, 1}, {7, 5}, {33, 37}, {300, 64}, {65, 130}};
    for (const auto& [tokens, channels] : shapes) {
        check_update(report, isa, random, tokens, channels, Dtype::float32);
        if (normtweak::hessian_bfloat16(isa)) check_update(report, isa, random, tokens, channels, Dtype::bfloat16);
    }
    for (const int64_t k : {1, 5, 16, 37, 130})
        for (const bool ordered : {false, true}) check_inverse(report, isa, random, k, ordered);
    return report.finish();
}

}  // namespace native
