#include "gemm_body.h"

// A diagonal block [count, count], its upper triangle given: H = R R^T with R upper triangular, then X = R^-1 in its
// place, with zeros below the diagonal. False when H is not positive definite.
static bool invert_block(float* h, int64_t stride, int64_t count) {
    float r[kInverseBlock * kInverseBlock], column[kInverseBlock];
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < count; ++j) r[i * kInverseBlock + j] = j < i ? 0.0f : h[i * stride + j];
    for (int64_t j = count - 1; j >= 0; --j) {
        const float pivot = r[j * kInverseBlock + j];
        if (!(pivot > 0.0f && pivot < __builtin_inff())) return false;
        const float root = __builtin_sqrtf(pivot);
        for (int64_t i = 0; i < j; ++i) column[i] = r[i * kInverseBlock + j] /= root;
        r[j * kInverseBlock + j] = root;
        for (int64_t i = 0; i < j; ++i) {
            float* row = r + i * kInverseBlock;
            for (int64_t l = i; l < j; ++l) row[l] -= column[i] * column[l];
        }
    }
    // From the last row up: X[i, :] = (I[i, :] - sum over l > i of R[i, l] X[l, :]) / R[i, i].
    for (int64_t i = count - 1; i >= 0; --i) {
        float* row = r + i * kInverseBlock;
        const float inverse = 1.0f / row[i];
        float sum[kInverseBlock] = {};
        for (int64_t l = i + 1; l < count; ++l)
            for (int64_t j = l; j < count; ++j) sum[j] += row[l] * r[l * kInverseBlock + j];
        for (int64_t j = i + 1; j < count; ++j) row[j] = -inverse * sum[j];
        row[i] = inverse;
    }
    for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(h + i * stride, r + i * kInverseBlock, static_cast<size_t>(count) * sizeof(float));
    return true;
}
