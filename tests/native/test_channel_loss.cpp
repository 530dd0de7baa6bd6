#include "native.h"

namespace native {

namespace {

struct Case {
    int64_t tokens, channels;
    bool masked;
    double mean;
};

// Around the blocks of 8 tokens x 256 channels, the slabs of 256 tokens, and every vector's tail; the last is large
// enough for a gradient in float32 that is written past the caches.
const Case kCases[] = {{1, 1, false, 0},    {7, 3, true, 0},    {9, 16, false, 100}, {40, 33, true, 0},
                       {300, 257, true, 0}, {517, 19, true, 0}, {64, 272, false, 0}, {4200, 1024, true, 3}};

struct Data {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    std::vector<double> values;

    Data(Random& random, const Case& c, Dtype dtype) : wide(random.normals(c.tokens * c.channels, 1.0, c.mean)) {
        wide[0] += 500;
        for (const float v : wide) {
            values.push_back(dtype == Dtype::float32 ? v : value_of(bits_near(v, dtype), dtype));
            if (dtype != Dtype::float32) narrow.push_back(bits_near(v, dtype));
        }
    }
    const void* x() const { return narrow.empty() ? static_cast<const void*>(wide.data()) : narrow.data(); }
};

void check_gradient(Report& report, Isa isa, Random& random, const normtweak::Tokens& input, const Data& data) {
    const int64_t channels = input.channels;
    const std::vector<float> mean = random.normals(channels), offset = random.normals(channels),
                             slope = random.normals(channels);
    const bool wide = input.dtype == Dtype::float32;
    std::vector<float> out(wide ? data.values.size() : 0, std::numeric_limits<float>::quiet_NaN());
    std::vector<uint16_t> out16(wide ? 0 : data.values.size(), 0x7fff);
    void* grad_x = wide ? static_cast<void*>(out.data()) : out16.data();
    normtweak::channel_loss_backward(isa, 2, input, {mean.data(), offset.data(), slope.data(), grad_x});
    for (size_t i = 0; i < data.values.size(); ++i) {
        const size_t c = i % static_cast<size_t>(channels);
        const bool kept = !input.mask || input.mask[i / static_cast<size_t>(channels)];
        const double product = slope[c] * (data.values[i] - mean[c]), wanted = kept ? offset[c] + product : 0;
        const double got = wide ? out[i] : value_of(out16[i], input.dtype);
        const double rounding = std::abs(wanted) * unit_of(input.dtype) + std::abs(product) * 0x1p-21 + 0x1p-24;
        report.near(got, wanted, kept ? rounding : 0, "gradient");
    }
}

void check_loss(Report& report, Isa isa, Random& random, const normtweak::Tokens& input, const Data& data) {
    const int64_t channels = input.channels;
    std::vector<double> mean(static_cast<size_t>(channels), 0), var(mean);
    int64_t kept = 0;
    for (int pass = 0; pass < 2; ++pass) {
        kept = 0;
        for (int64_t t = 0; t < input.tokens; ++t) {
            if (input.mask && !input.mask[t]) continue;
            ++kept;
            for (int64_t c = 0; c < channels; ++c) {
                const double v = data.values[static_cast<size_t>(t * channels + c)];
                if (pass == 0)
                    mean[c] += v;
                else
                    var[c] += (v - mean[c]) * (v - mean[c]);
            }
        }
        for (double& v : pass ? var : mean) v /= static_cast<double>(kept);
    }
    const std::vector<float> mean_f = random.normals(channels), var_f = random.normals(channels, 0.1, 1.0);
    std::vector<float> mean_q(mean.size(), NAN), var_q(mean.size(), NAN);
    std::vector<double> means(mean.size(), NAN), m2s(mean.size(), NAN);
    for (const bool squared : {false, true}) {
        const double loss =
            normtweak::channel_loss(isa, 2, input, mean_f.data(), var_f.data(), squared, mean_q.data(), var_q.data());
        double wanted = 0;
        for (int64_t c = 0; c < channels; ++c) {
            const double d = mean[c] - mean_f[c], e = var[c] - var_f[c];
            wanted += (squared ? d * d + e * e : std::abs(d) + std::abs(e)) / static_cast<double>(channels);
        }
        report.near(loss, wanted, 1e-5 * wanted, "loss");
    }
    report.near(static_cast<double>(normtweak::channel_statistics(isa, 2, input, means.data(), m2s.data())),
                static_cast<double>(kept), 0, "number of tokens");
    for (int64_t c = 0; c < channels; ++c) {
        report.near(mean_q[c], mean[c], 1e-6 * (std::abs(mean[c]) + std::sqrt(var[c])), "mean");
        report.near(var_q[c], var[c], 1e-5 * var[c], "variance");
        report.near(means[c], mean_q[c], 0x1p-23 * std::abs(mean[c]), "collected mean");
        report.near(m2s[c], var_q[c] * static_cast<double>(kept), 1e-6 * m2s[c], "collected squares");
    }
}

}  // namespace

bool test_channel_loss(Isa isa) {
    Random random;
    Report report("channel_loss", isa);
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        for (const Case& c : kCases) {
            const Data data(random, c, dtype);
            // vector<bool> has no bytes to point to.
            std::vector<uint8_t> mask(static_cast<size_t>(c.tokens));
            for (uint8_t& m : mask) m = random.uniform() < 0.7;
            mask.back() = 1;
            const bool* kept = c.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
            const normtweak::Tokens input = {data.x(), kept, c.tokens, c.channels, dtype};
            check_loss(report, isa, random, input, data);
            check_gradient(report, isa, random, input, data);
        }
    }
    return report.finish();
}

}  // namespace native
