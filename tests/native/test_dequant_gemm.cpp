#include "native.h"

namespace native {

namespace {

struct Shape {
    int64_t n, k, groups;
};

// A packed weight and the numbers that it stands for.
struct Weight {
    std::vector<int32_t> words;
    std::vector<float> scales;
    std::vector<uint16_t> halves;
    std::vector<uint8_t> zeros;
    std::vector<int> codes;      // [n, k]
    std::vector<double> values;  // [n, k]
    normtweak::PackedWeight packed;

    Weight(Random& random, const Shape& s, int bits, bool asymmetric, Dtype scale_dtype) {
        const int64_t chunks = normtweak::ceil_div(s.k, normtweak::kChunk);
        words.assign(static_cast<size_t>(normtweak::ceil_div(s.n, 16) * chunks * bits * 16), 0);
        for (int64_t i = 0; i < s.groups * s.n; ++i) {
            halves.push_back(bits_near(static_cast<float>(0.5 + random.uniform()), Dtype::float16));
            scales.push_back(static_cast<float>(value_of(halves.back(), Dtype::float16)));
            zeros.push_back(asymmetric ? static_cast<uint8_t>(random.below(int64_t{1} << bits))
                                       : static_cast<uint8_t>(1 << (bits - 1)));
        }
        for (int64_t row = 0; row < s.n; ++row) {
            for (int64_t k = 0; k < s.k; ++k) {
                const int code = static_cast<int>(random.below(int64_t{1} << bits));
                set(row, k, code, bits, chunks);
                codes.push_back(code);
                const int64_t at = k / (s.k / s.groups) * s.n + row;
                values.push_back(static_cast<double>(code - zeros[at]) * scales[at]);
            }
        }
        const bool half = scale_dtype == Dtype::float16;
        packed = {words.data(),
                  half ? static_cast<const void*>(halves.data()) : scales.data(),
                  asymmetric ? zeros.data() : nullptr,
                  s.n,
                  s.k,
                  s.groups,
                  scale_dtype,
                  bits};
    }

  private:
    // As packing.py describes the layout.
    void set(int64_t row, int64_t k, int code, int bits, int64_t chunks) {
        const int r = static_cast<int>(k % 32) / 4, j = static_cast<int>(k % 4), low = bits == 3 ? 2 : bits;
        const int per_byte = 8 / low;
        const auto put = [&](int word, int shift, int value) {
            const int64_t at = ((row / 16 * chunks + k / 32) * bits + word) * 16 + row % 16;
            words[at] = static_cast<int32_t>(static_cast<uint32_t>(words[at]) | static_cast<uint32_t>(value) << shift);
        };
        put(r / per_byte, 8 * j + low * (r % per_byte), code & ((1 << low) - 1));
        if (bits == 3) put(2, 8 * j + r, code >> 2);
    }
};

void check_product(Report& report, Isa isa, Random& random, const Shape& s, const Weight& weight, int64_t m) {
    const int64_t padded = normtweak::ceil_div(s.k, 32) * 32;
    std::vector<float> x(static_cast<size_t>(m * padded), 0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t k = 0; k < s.k; ++k) x[i * padded + k] = static_cast<float>(random.normal());
    const std::vector<float> bias = random.normals(s.n);
    std::vector<float> y(static_cast<size_t>(m * s.n), NAN);
    const bool biased = m % 2;
    normtweak::dequant_gemm_small(isa, 2, weight.packed, x.data(), biased ? bias.data() : nullptr, y.data(), m);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t n = 0; n < s.n; ++n) {
            double sum = biased ? bias[n] : 0, size = std::abs(sum);
            for (int64_t k = 0; k < s.k; ++k) {
                const double product = x[i * padded + k] * weight.values[n * s.k + k];
                sum += product;
                size += std::abs(product);
            }
            // Codes and zeros are multiplied apart: what cancels between them may be as large as the zero.
            report.near(y[i * s.n + n], sum, 4e-6 * size + 1e-4, "product");
        }
    }
}

// By integer products: the bound is what splitting x into so many bytes may lose.
void check_integers(Report& report, Isa isa, Random& random, const Shape& s, const Weight& weight, int64_t m) {
    if (!normtweak::integer_gemm_supported(isa, s.k, s.groups)) return;
    const std::vector<float> x = random.normals(m * s.k), bias = random.normals(s.n);
    for (int planes = 1; planes <= 3; ++planes) {
        for (const bool per_token : {false, true}) {
            if (per_token && planes > 1) continue;
            std::vector<float> y(static_cast<size_t>(m * s.n), NAN);
            normtweak::integer_gemm(
                isa, 2, {weight.packed, x.data(), bias.data(), y.data(), m, Dtype::float32, planes, per_token});
            for (int64_t i = 0; i < m; ++i) {
                double largest = 0;
                for (int64_t k = 0; k < s.k; ++k)
                    largest = std::max(largest, std::abs(static_cast<double>(x[i * s.k + k])));
                for (int64_t n = 0; n < s.n; ++n) {
                    double sum = bias[n], size = 0;
                    for (int64_t k = 0; k < s.k; ++k) {
                        sum += x[i * s.k + k] * weight.values[n * s.k + k];
                        size += std::abs(weight.values[n * s.k + k]);
                    }
                    const double lost = largest * size * (std::ldexp(1, 1 - 8 * planes) + 4e-6);
                    report.near(y[i * s.n + n], sum, lost + 1e-4, "product of integers");
                }
            }
        }
    }
}

void check_panel(Report& report, Isa isa, const Shape& s, const Weight& weight, Dtype dtype) {
    const int64_t n0 = s.n > 16 ? 16 : 0, k0 = s.k > 32 ? 32 : 0, lanes = normtweak::ceil_div(s.n - n0, 16) * 16;
    const int64_t stride = lanes + 16, size = (s.k - k0 - 1) * stride + lanes;  // nothing behind the last row
    std::vector<float> wide(dtype == Dtype::float32 ? static_cast<size_t>(size) : 0, NAN);
    std::vector<uint16_t> narrow(dtype == Dtype::float32 ? 0 : static_cast<size_t>(size), 0x7fff);
    void* out = wide.empty() ? static_cast<void*>(narrow.data()) : wide.data();
    normtweak::dequantize_panel(isa, 2, weight.packed, {n0, s.n, k0, s.k, stride, dtype, out});
    for (int64_t k = k0; k < s.k; ++k) {
        for (int64_t n = n0; n < s.n; ++n) {
            const size_t at = static_cast<size_t>((k - k0) * stride + n - n0);
            const double wanted = weight.values[n * s.k + k];
            const double got = wide.empty() ? value_of(narrow[at], Dtype::bfloat16) : wide[at];
            report.near(got, wanted, std::abs(wanted) * unit_of(dtype) / 2, "dequantized weight");
        }
    }
}

// GPTQ's words hold the codes of a row as one stream of bits.
void check_repack(Report& report, Isa isa, const Shape& s, Weight& weight, int bits) {
    std::vector<int32_t> gptq(static_cast<size_t>(normtweak::ceil_div(s.k * bits, 32) * s.n), -1);
    std::vector<int32_t> packed(weight.words.size(), -1);
    normtweak::repack_gptq(isa, 2, {gptq.data(), weight.words.data(), s.n, s.k, bits, true});
    for (int64_t row = 0; row < s.n; ++row) {
        for (int64_t bit = 0; bit < s.k * bits; ++bit) {
            const int got = static_cast<int>(static_cast<uint32_t>(gptq[bit / 32 * s.n + row]) >> (bit % 32) & 1);
            report.near(got, weight.codes[row * s.k + bit / bits] >> (bit % bits) & 1, 0, "bit of GPTQ's words");
        }
    }
    normtweak::repack_gptq(isa, 2, {gptq.data(), packed.data(), s.n, s.k, bits, false});
    report.holds(packed == weight.words, "packed words come back");
}

}  // namespace

bool test_dequant_gemm(Isa isa) {
    Random random;
    Report report("dequant_gemm", isa);
    const Shape shapes[] = {{1, 5, 1},    {16, 32, 1},  {37, 96, 3}, {21, 200, 1},
                            {33, 120, 5}, {50, 192, 3}, {17, 8, 4},  {40, 256, 2}};
    for (const int bits : {2, 3, 4, 8}) {
        for (const Shape& s : shapes) {
            for (const bool asymmetric : {false, true}) {
                Weight weight(random, s, bits, asymmetric, asymmetric ? Dtype::float16 : Dtype::float32);
                for (int64_t m = 1; m <= 9; ++m) check_product(report, isa, random, s, weight, m);
                check_product(report, isa, random, s, weight, 64);
                for (const int64_t m : {1, 3, 4, 17}) check_integers(report, isa, random, s, weight, m);
                check_repack(report, isa, s, weight, bits);
                check_panel(report, isa, s, weight, Dtype::float32);
                check_panel(report, isa, s, weight, Dtype::bfloat16);
            }
        }
    }
    return report.finish();
}

}  // namespace native
