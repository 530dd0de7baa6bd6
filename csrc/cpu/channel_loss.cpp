#include <cmath>
#include <limits>

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

}  // namespace

double channel_loss(Isa isa, int threads, const Tokens& input, const float* mean_f, const float* var_f, bool squared,
                    float* mean_q, float* var_q) {
    const auto statistics = NT_PICK(isa, slab_statistics);
    const int64_t channels = input.channels, slabs = std::min(kMaxSlabs, ceil_div(input.tokens, kSlabTokens));
    const int64_t tile = portable::kTileTokens * portable::kTileChannels;
    std::vector<int64_t> kept(static_cast<size_t>(slabs));
    std::vector<double> means(static_cast<size_t>(slabs * channels)), m2s(means.size());
    std::vector<float> tiles(static_cast<size_t>(tile * threads));
    parallel_parts(slabs, threads, [&](int64_t part, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kept[i] = statistics(input, input.tokens * i / slabs, input.tokens * (i + 1) / slabs,
                                 tiles.data() + part * tile, means.data() + i * channels, m2s.data() + i * channels);
        }
    });
    int64_t total =
        kept[0];  // a slab without a token is all zeros, and so is the sum that a first token is merged into
    for (int64_t i = 1; i < slabs; ++i) {
        if (kept[i] == 0) continue;
        const double n = static_cast<double>(kept[i]), before = static_cast<double>(total), share = n / (before + n);
        for (int64_t c = 0; c < channels; ++c) {
            const double delta = means[i * channels + c] - means[c];
            means[c] += delta * share;
            m2s[c] += m2s[i * channels + c] + delta * delta * share * before;
        }
        total += kept[i];
    }
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

void channel_loss_backward(Isa isa, int threads, const Tokens& input, const float* mean, const float* offset,
                           const float* slope, void* grad_x) {
    const auto gradients = NT_PICK(isa, token_gradients);
    parallel_parts(input.tokens, threads, [&](int64_t, int64_t begin, int64_t end) {
        gradients(input, begin, end, mean, offset, slope, grad_x);
    });
}

}  // namespace normtweak
