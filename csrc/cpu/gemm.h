// Products of matrices, C = sign A B or C += sign A B, in tiles that are computed independently of one another: any
// split of the tiles over threads gives the same sums. gemm_body.h computes a tile.
//
// Why not the BLAS in torch: on a Zen 5 core its float32 product runs at 90 GFLOP/s where these tiles reach 140 to 200,
// and it neither leaves out triangles (half of a Hessian, a third of a triangular inverse) nor keeps rows in a cache
// between GPTQ's blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "../packing.h"
#include "parallel.h"

namespace normtweak {

// The part of C that is wanted; nothing else of it is touched.
enum class Part { all, upper, lower };

// A(i, p) = a[i * a_row + p * a_column], B likewise, one of the two steps 1; C(i, j) = c[i * c_row + j]. T: float, or
// uint16_t for bfloat16.
template <class T>
struct GemmOf {
    const T* a;
    int64_t a_row, a_column;
    const T* b;
    int64_t b_row, b_column;
    float* c;
    int64_t c_row, m, n, k;
    float sign = 1.0f;
    bool accumulate = false;
    Part part = Part::all;
    // Zero triangles that are left out: A(i, p < i), B(p > j, j), B(p < j, j).
    bool a_upper = false, b_upper = false, b_lower = false;
};
using Gemm = GemmOf<float>;

// A tile's operands, packed, fit into a 1 MB second-level cache. Both sizes are multiples of every register tile.
constexpr int64_t kGemmRows = 240, kGemmColumns = 480, kGemmDepth = 256;
constexpr int64_t kGemmScratch = (kGemmRows + kGemmColumns) * kGemmDepth;

// Uninitialised floats from the start of a cache line on, which no vector then straddles.
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : floats_(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), kLine))) {}
    float* get() const { return floats_.get(); }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Delete {
        void operator()(float* p) const { ::operator delete(p, kLine); }
    };
    std::unique_ptr<float, Delete> floats_;
};

// All tiles of a product. tile: an instruction set's gemm_tile; scratch: kGemmScratch for each thread.
template <class T>
void gemm(void (*tile)(const GemmOf<T>&, int64_t, float*), int threads, const GemmOf<T>& product, float* scratch) {
    const int64_t tiles = ceil_div(product.m, kGemmRows) * ceil_div(product.n, kGemmColumns);
    const int64_t parts = std::min<int64_t>(tiles, threads);
    // Dealt out in turn, as the cost of a triangle's tiles rises along its rows.
    parallel_parts(parts, threads, [&](int64_t part, int64_t, int64_t) {
        for (int64_t i = part; i < tiles; i += parts) tile(product, i, scratch + part * kGemmScratch);
    });
}

}  // namespace normtweak
