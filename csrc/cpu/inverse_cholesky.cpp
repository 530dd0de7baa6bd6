#include <cstring>

#include "gemm.h"
#include "kernels.h"

namespace normtweak {
// Below this the products are too small to be worth packing their operands.
constexpr int64_t kInverseBlock = 64;
}  // namespace normtweak

#define NT_BODY "inverse_cholesky_body.h"
#include "foreach_isa.h"

namespace normtweak {

namespace {

class Recursion {
  public:
    Recursion(Isa isa, int threads, float* h, int64_t k)
        : tile_(NT_PICK(isa, gemm_tile)),
          block_(NT_PICK(isa, invert_block)),
          threads_(threads),
          h_(h),
          stride_(k),
          half_(ceil_div(ceil_div(k, kInverseBlock), 2) * kInverseBlock),
          other_(half_ * half_),
          scratch_(kGemmScratch * threads) {}

    // Rows and columns [first, first + count). The upper triangle of H = R R^T becomes X = R^-1, its lower one zero.
    // With the halves as blocks: R12 = H12 X22^T, H11 -= R12 R12^T, X12 = -X11 (R12 X22); 2/3 count^3 operations.
    bool invert(int64_t first, int64_t count) {
        if (count <= kInverseBlock) return block_(at(first, first), stride_, count);
        const int64_t low = ceil_div(ceil_div(count, kInverseBlock), 2) * kInverseBlock, high = count - low;
        const int64_t middle = first + low;
        float *h12 = at(first, middle), *x22 = at(middle, middle), *other = other_.get();
        if (!invert(middle, high)) return false;
        Gemm r12 = {h12, stride_, 1, x22, 1, stride_, other, high, low, high, high};
        r12.b_lower = true;
        multiply(r12);
        Gemm h11 = {other, high, 1, other, 1, high, at(first, first), stride_, low, low, high};
        h11.sign = -1.0f;
        h11.accumulate = true;
        h11.part = Part::upper;
        multiply(h11);
        Gemm product = {other, high, 1, x22, stride_, 1, h12, stride_, low, high, high};
        product.b_upper = true;
        multiply(product);
        if (!invert(first, low)) return false;
        for (int64_t i = 0; i < low; ++i)
            std::memcpy(other + i * high, h12 + i * stride_, static_cast<size_t>(high) * sizeof(float));
        Gemm x12 = {at(first, first), stride_, 1, other, high, 1, h12, stride_, low, high, low};
        x12.sign = -1.0f;
        x12.a_upper = true;
        multiply(x12);
        for (int64_t i = middle; i < first + count; ++i) std::fill_n(at(i, first), low, 0.0f);
        return true;
    }

  private:
    float* at(int64_t i, int64_t j) const { return h_ + i * stride_ + j; }
    void multiply(const Gemm& product) { gemm(tile_, threads_, product, scratch_.get()); }

    void (*tile_)(const Gemm&, int64_t, float*);
    bool (*block_)(float*, int64_t, int64_t);
    int threads_;
    float* h_;
    int64_t stride_, half_;
    Scratch other_, scratch_;
};

}  // namespace

bool inverse_cholesky(Isa isa, int threads, const InverseCholesky& args) {
    const int64_t k = args.k;
    // Rows are dealt out in turn, as they become shorter.
    const int64_t parts = std::min<int64_t>(k, threads);
    parallel_parts(parts, threads, [&](int64_t part, int64_t, int64_t) {
        for (int64_t i = part; i < k; i += parts) {
            const int64_t from = args.order ? args.order[i] : i;
            const float* row = args.hessian + from * k;
            float* to = args.factor + i * k;
            for (int64_t j = i; j < k; ++j) to[j] = row[args.order ? args.order[j] : j];
            to[i] += args.damping[from];
        }
    });
    if (!Recursion(isa, threads, args.factor, k).invert(0, k)) return false;
    // Pivots were checked as they came; a sum of products may still have run over.
    std::vector<uint32_t> infinite(static_cast<size_t>(parts));
    parallel_parts(parts, threads, [&](int64_t part, int64_t, int64_t) {
        uint32_t found = 0;
        for (int64_t i = part; i < k; i += parts) {
            for (int64_t j = i; j < k; ++j) {
                uint32_t value;
                std::memcpy(&value, args.factor + i * k + j, sizeof value);
                found |= (value & 0x7f800000) == 0x7f800000;
            }
        }
        infinite[static_cast<size_t>(part)] = found;
    });
    return std::none_of(infinite.begin(), infinite.end(), [](uint32_t found) { return found != 0; });
}

}  // namespace normtweak
