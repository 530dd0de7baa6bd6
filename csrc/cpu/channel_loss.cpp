#include <cmath>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../packing.h"
#include "kernels.h"
#include "parallel.h"

#define NT_BODY "channel_loss_body.h"
#include "foreach_isa.h"

namespace normtweak {

namespace {

// Slabs of tokens are reduced in parallel and merged in order. Their number depends on the shape alone, so that the
// result doesn't depend on the threads; 64 are enough for any machine and bound the partial results.
constexpr int64_t kSlabTokens = 256, kMaxSlabs = 64;
// Above this, a gradient is written past the caches, which wouldn't hold it for its reader.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

}  // namespace

int64_t channel_statistics(Isa isa, int threads, const Tokens& input, double* mean, double* m2) {
    const auto statistics = NT_PICK(isa, slab_statistics);
    const int64_t channels = input.channels, slabs = std::min(kMaxSlabs, ceil_div(input.tokens, kSlabTokens));
    std::vector<int64_t> kept(static_cast<size_t>(slabs));
    std::vector<double> rest(static_cast<size_t>(2 * (slabs - 1) * channels));
    // The first slab's go where all others are merged into.
    const auto mean_of = [&](int64_t i) { return i ? rest.data() + 2 * (i - 1) * channels : mean; };
    const auto m2_of = [&](int64_t i) { return i ? mean_of(i) + channels : m2; };
    parallel_parts(slabs, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kept[i] = statistics(input, input.tokens * i / slabs, input.tokens * (i + 1) / slabs, mean_of(i), m2_of(i));
        }
    });
    int64_t total = kept[0];  // a slab without a token is all zeros, as is the sum that a first token is merged into
    for (int64_t i = 1; i < slabs; ++i) {
        if (kept[i] == 0) continue;
        const double n = static_cast<double>(kept[i]), before = static_cast<double>(total), share = n / (before + n);
        const double *added_mean = mean_of(i), *added_m2 = m2_of(i);
        for (int64_t c = 0; c < channels; ++c) {
            const double delta = added_mean[c] - mean[c];
            mean[c] += delta * share;
            m2[c] += added_m2[c] + delta * delta * share * before;
        }
        total += kept[i];
    }
    return total;
}

double channel_loss(Isa isa, int threads, const Tokens& input, const float* mean_f, const float* var_f, bool squared,
                    float* mean_q, float* var_q) {
    const int64_t channels = input.channels;
    std::vector<double> means(static_cast<size_t>(channels)), m2s(means.size());
    const int64_t total = channel_statistics(isa, threads, input, means.data(), m2s.data());
    const double count = total ? static_cast<double>(total) : std::numeric_limits<double>::quiet_NaN();
    double loss = 0;
    for (int64_t c = 0; c < channels; ++c) {
        const double mean = total ? means[c] : count, var = m2s[c] / count;
        const double d_mean = mean - mean_f[c], d_var = var - var_f[c];
        loss += squared ? d_mean * d_mean + d_var * d_var : std::abs(d_mean) + std::abs(d_var);
        mean_q[c] = static_cast<float>(mean);
        var_q[c] = static_cast<float>(var);
    }
    return loss / static_cast<double>(channels);
}

void channel_loss_backward(Isa isa, int threads, const Tokens& input, const TokenGradient& gradient) {
    const auto gradients = NT_PICK(isa, token_gradients);
    const int64_t row_bytes = input.channels * (input.dtype == Dtype::float32 ? 4 : 2);
    const bool aligned = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(gradient.grad_x) % 64 == 0;
    const bool streamed = aligned && row_bytes * input.tokens > kStreamedBytes;
    parallel_parts(input.tokens, threads,
                   [&](int64_t, int64_t begin, int64_t end) { gradients(input, begin, end, gradient, streamed); });
}

}  // namespace normtweak
