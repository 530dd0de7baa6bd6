// One signature per kernel. Pointers are to contiguous tensors; a null pointer stands for an absent optional tensor.
// Every kernel gives the same result for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace normtweak {

enum class Isa { portable, dotprod, avx2, avx2_vnni, avx512, avx512_vnni, amx, amx_emulated };
enum class Dtype { float32, bfloat16, float16 };

// isa.cpp. The best instruction set that the processor has, or the lower one that NORMTWEAK_ISA or `set_isa` asks for.
Isa current_isa();
void set_isa(const std::string& name);  // empty: back to NORMTWEAK_ISA
std::vector<std::string> available_isas();
std::vector<std::string> emulated_isas();  // for tests: slow, used only where asked for
const char* isa_name(Isa isa);
// What the processor's BLAS can count on, whatever instruction set is chosen here.
bool has_bfloat16();
bool has_amx();
int isa_lanes(Isa isa);  // float32 values in a vector

// How a grid is found; see affine.py.
struct GridRule {
    int bits;
    bool symmetric;
    int64_t clip_steps;
    double min_clip;
};

// weight [n, k], importance [k] or null -> scales [k / group_size, n], zeros likewise.
struct GroupParams {
    const float* weight;
    const float* importance;
    float* scales;
    uint8_t* zeros;
    int64_t n, k, group_size;
    GridRule rule;
};
void group_params(Isa isa, int threads, const GroupParams& args);

// Columns [start, stop) of weight [n, k]; with order [k], column j is the one that stands at order[j] in weight and
// codes. Groups' grids, scales and zeros [groups, n], are found and written with find_grids, else read: column j's
// group is group_index[j], or without that the one in whose k / groups columns of weight it stands. updated [n, k], or
// null: the quantized values, and in the columns after them the weight less their errors.
struct GptqBlock {
    const float* weight;
    const int64_t* order;
    const float* hinv;
    uint8_t* codes;
    float* scales;
    uint8_t* zeros;
    const int32_t* group_index;
    float* updated;
    int64_t n, k, groups, start, stop;
    GridRule rule;
    bool find_grids;
};
void gptq_block_update(Isa isa, int threads, const GptqBlock& args);

// hessian [k, k] symmetric, damping [k] for its diagonal, order [k] or null: H(i, j) = hessian(order[i], order[j]).
// factor [k, k]: the upper triangular R^-1, where H = R R^T. False when H is not positive definite; factor is undefined
// then.
struct InverseCholesky {
    const float* hessian;
    const float* damping;
    const int64_t* order;
    float* factor;
    int64_t k;
};
bool inverse_cholesky(Isa isa, int threads, const InverseCholesky& args);

// The lower triangle of hessian [channels, channels] += x^T x, x [tokens, channels] float32, or bfloat16 where
// hessian_bfloat16 says so.
bool hessian_bfloat16(Isa isa);
void hessian_update(Isa isa, int threads, const void* x, Dtype dtype, float* hessian, int64_t tokens, int64_t channels);

// words [ceil(n/16), ceil(k/32) * bits, 16], scales [groups, n] float16 or float32, zeros [groups, n] or null.
struct PackedWeight {
    const int32_t* words;
    const void* scales;
    const uint8_t* zeros;
    int64_t n, k, groups;
    Dtype scale_dtype;
    int bits;
};
// y [m, n] = x @ dequant(W)^T + bias, for few rows; x [m, ceil(k/32) * 32] with zeros after k.
void dequant_gemm_small(Isa isa, int threads, const PackedWeight& weight, const float* x, const float* bias, float* y,
                        int64_t m);
// The same by integer products, for any number of rows. x [m, k], bias [n] or null and y [m, n] of one dtype. x is
// split into `planes` signed bytes a value: per run of at most 64 values of a row, or with per_token (1 plane) of a
// whole row, by a scale of its own. A run with a value that isn't finite gives NaN.
struct IntegerGemm {
    PackedWeight weight;
    const void* x;
    const void* bias;
    void* y;
    int64_t m;
    Dtype dtype;
    int planes;
    bool per_token;
};
// For tests: one tdpbsud. c [m, n] int32, a [m, k] fours of signed bytes, b [k, n] fours of unsigned ones: c (+)= a b,
// the products of two fours summed. m, n and k at most 16, strides in bytes.
struct TileProduct {
    const void* a;
    const void* b;
    void* c;
    int m, n, k;
    int64_t stride_a, stride_b, stride_c;
    bool add;
};
void tile_product(bool emulated, const TileProduct& args);
bool integer_gemm_supported(Isa isa, int64_t k, int64_t groups);
void integer_gemm(Isa isa, int threads, const IntegerGemm& args);
// dequant(W)[n0:n1, k0:k1] transposed: out [k1 - k0, ceil((n1 - n0) / 16) * 16], rows `stride` values apart, n0 a
// multiple of 16 and k0 of 32. Lanes past n1 get any finite value.
struct Panel {
    int64_t n0, n1, k0, k1, stride;
    Dtype dtype;  // float32 or bfloat16
    void* out;
};
void dequantize_panel(Isa isa, int threads, const PackedWeight& weight, const Panel& panel);

// Between GPTQ's words [ceil(k * bits / 32), n] and the packed ones [ceil(n/16), ceil(k/32) * bits, 16].
struct Repack {
    int32_t* gptq;
    int32_t* packed;
    int64_t n, k;
    int bits;
    bool to_gptq;  // or from it
};
void repack_gptq(Isa isa, int threads, const Repack& args);

// x [tokens, channels], mask [tokens] or null.
struct Tokens {
    const void* x;
    const bool* mask;
    int64_t tokens, channels;
    Dtype dtype;
};
// Each channel's mean and sum of squared deviations from it over the kept tokens, [channels] each, zeros without one.
// Returns the number of kept tokens.
int64_t channel_statistics(Isa isa, int threads, const Tokens& input, double* mean, double* m2);
// Returns the loss; writes mean_q and var_q [channels]. NaN when no token is kept.
double channel_loss(Isa isa, int threads, const Tokens& input, const float* mean_f, const float* var_f, bool squared,
                    float* mean_q, float* var_q);
// grad_x [tokens, channels] in x's dtype = offset + slope * (x - mean), [channels] each; 0 where masked.
struct TokenGradient {
    const float *mean, *offset, *slope;
    void* grad_x;
};
void channel_loss_backward(Isa isa, int threads, const Tokens& input, const TokenGradient& gradient);

}  // namespace normtweak
