// The only file that sees pybind11: check, release the GIL, call. Tensors come as addresses (0: absent) with their
// shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "cpu/kernels.h"
#include "packing.h"

namespace py = pybind11;

namespace normtweak {
namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
T* required(const char* op, const char* argument, uintptr_t address) {
    check(address != 0, op, argument, "a tensor's address", "0");
    return pointer<T>(address);
}

Dtype parse_dtype(const char* op, const std::string& name) {
    check(name == "float32" || name == "bfloat16" || name == "float16", op, "dtype", "float32, bfloat16 or float16",
          name);
    return name == "float32" ? Dtype::float32 : name == "bfloat16" ? Dtype::bfloat16 : Dtype::float16;
}

void check_size(const char* op, const char* argument, int64_t size) {
    check(size > 0, op, argument, "positive", size);
}

void check_bits(const char* op, int bits) {
    check(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, "bits", "one of 2, 3, 4, 8", bits);
}

// A grid may have any number of levels; which codes can be packed is another matter.
GridRule grid_rule(const char* op, int bits, bool symmetric, int64_t clip_steps, double min_clip) {
    check(bits >= 2 && bits <= 8, op, "bits", "2 to 8", bits);
    check(clip_steps >= 0, op, "clip_steps", "0 or more", clip_steps);
    return {bits, symmetric, clip_steps, min_clip};
}

void bind_group_params(int threads, uintptr_t weight, uintptr_t importance, int64_t n, int64_t k, int64_t group_size,
                       int bits, bool symmetric, int64_t clip_steps, double min_clip, uintptr_t scales,
                       uintptr_t zeros) {
    const char* op = "group_params";
    check_size(op, "threads", threads);
    check_size(op, "n", n);
    check_size(op, "k", k);
    check(group_size > 0 && k % group_size == 0, op, "group_size", "a divisor of K", group_size);
    const GroupParams args = {required<float>(op, "weight", weight),
                              pointer<float>(importance),
                              required<float>(op, "scales", scales),
                              required<uint8_t>(op, "zeros", zeros),
                              n,
                              k,
                              group_size,
                              grid_rule(op, bits, symmetric, clip_steps, min_clip)};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    group_params(isa, threads, args);
}

// Columns in another order: a permutation of 0 .. k - 1.
void check_order(const char* op, const int64_t* order, int64_t k) {
    std::vector<bool> seen(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) {
        check(order[i] >= 0 && order[i] < k && !seen[static_cast<size_t>(order[i])], op, "order",
              "a permutation of the columns", order[i]);
        seen[static_cast<size_t>(order[i])] = true;
    }
}

void bind_gptq_block_update(int threads, uintptr_t weight, uintptr_t hinv, uintptr_t codes, uintptr_t scales,
                            uintptr_t zeros, uintptr_t group_index, int64_t n, int64_t k, int64_t groups, int64_t start,
                            int64_t stop, int bits, bool symmetric, int64_t clip_steps, double min_clip) {
    const char* op = "gptq_block_update";
    check_size(op, "threads", threads);
    check_size(op, "n", n);
    check_size(op, "k", k);
    check(groups > 0 && k % groups == 0, op, "groups", "a divisor of K", groups);
    check(0 <= start && start < stop && stop <= k, op, "start, stop", "0 <= start < stop <= K",
          std::to_string(start) + ", " + std::to_string(stop));
    const auto* index = pointer<int32_t>(group_index);
    if (index) {
        for (int64_t j = start; j < stop; ++j)
            check(index[j] >= 0 && index[j] < groups, op, "group_index", "in [0, G)", index[j]);
    } else {
        check(start % (k / groups) == 0 && stop % (k / groups) == 0, op, "start, stop", "multiples of the group size",
              start);
    }
    auto* values = required<float>(op, "weight", weight);
    const GptqBlock args = {values,
                            nullptr,
                            required<float>(op, "hinv", hinv),
                            required<uint8_t>(op, "codes", codes),
                            required<float>(op, "scales", scales),
                            required<uint8_t>(op, "zeros", zeros),
                            index,
                            values,
                            n,
                            k,
                            groups,
                            start,
                            stop,
                            grid_rule(op, bits, symmetric, clip_steps, min_clip),
                            !index};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    gptq_block_update(isa, threads, args);
}

void bind_gptq_solve(int threads, uintptr_t weight, uintptr_t hinv, uintptr_t scales, uintptr_t zeros, uintptr_t order,
                     uintptr_t codes, int64_t n, int64_t k, int64_t groups, int bits) {
    const char* op = "gptq_solve";
    check_size(op, "threads", threads);
    check_size(op, "n", n);
    check_size(op, "k", k);
    check(groups > 0 && k % groups == 0, op, "groups", "a divisor of K", groups);
    const auto* columns = pointer<int64_t>(order);
    if (columns) check_order(op, columns, k);
    // The grids are only read.
    const GptqBlock args = {required<float>(op, "weight", weight),
                            columns,
                            required<float>(op, "hinv", hinv),
                            required<uint8_t>(op, "codes", codes),
                            required<float>(op, "scales", scales),
                            required<uint8_t>(op, "zeros", zeros),
                            nullptr,
                            nullptr,
                            n,
                            k,
                            groups,
                            0,
                            k,
                            grid_rule(op, bits, false, 0, 1.0),
                            false};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    gptq_block_update(isa, threads, args);
}

bool bind_inverse_cholesky(int threads, uintptr_t hessian, uintptr_t damping, uintptr_t order, uintptr_t factor,
                           int64_t k) {
    const char* op = "inverse_cholesky";
    check_size(op, "threads", threads);
    check_size(op, "k", k);
    const auto* columns = pointer<int64_t>(order);
    if (columns) check_order(op, columns, k);
    const InverseCholesky args = {required<float>(op, "hessian", hessian), required<float>(op, "damping", damping),
                                  columns, required<float>(op, "factor", factor), k};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    return inverse_cholesky(isa, threads, args);
}

void bind_hessian_update(int threads, uintptr_t hessian, uintptr_t x, const std::string& dtype, int64_t tokens,
                         int64_t channels) {
    const char* op = "hessian_update";
    check_size(op, "threads", threads);
    check_size(op, "tokens", tokens);
    check_size(op, "channels", channels);
    const Isa isa = current_isa();
    const Dtype type = parse_dtype(op, dtype);
    check(type == Dtype::float32 || (type == Dtype::bfloat16 && hessian_bfloat16(isa)), op, "dtype",
          "one that this processor multiplies", dtype);
    auto* sums = required<float>(op, "hessian", hessian);
    const auto* values = required<void>(op, "x", x);
    py::gil_scoped_release release;
    hessian_update(isa, threads, values, type, sums, tokens, channels);
}

PackedWeight packed_weight(uintptr_t words, uintptr_t scales, const std::string& scale_dtype, uintptr_t zeros,
                           int64_t n, int64_t k, int64_t groups, int bits) {
    const char* op = "PackedWeight";
    check_bits(op, bits);
    check_size(op, "n", n);
    check_size(op, "k", k);
    check(groups > 0 && k % groups == 0, op, "groups", "a divisor of K", groups);
    check(scale_dtype != "bfloat16", op, "scale_dtype", "float16 or float32", scale_dtype);
    return {required<int32_t>(op, "words", words),
            required<void>(op, "scales", scales),
            pointer<uint8_t>(zeros),
            n,
            k,
            groups,
            parse_dtype(op, scale_dtype),
            bits};
}

void bind_dequant_gemm_small(const PackedWeight& weight, int threads, uintptr_t x, uintptr_t bias, uintptr_t y,
                             int64_t m) {
    const char* op = "dequant_gemm";
    check_size(op, "threads", threads);
    check_size(op, "m", m);
    const auto* xs = required<float>(op, "x", x);
    auto* ys = required<float>(op, "y", y);
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    dequant_gemm_small(isa, threads, weight, xs, pointer<float>(bias), ys, m);
}

void bind_integer_gemm(const PackedWeight& weight, int threads, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t m,
                       const std::string& dtype, int planes, bool per_token) {
    const char* op = "dequant_gemm";
    check_size(op, "threads", threads);
    check_size(op, "m", m);
    check(1 <= planes && planes <= 3, op, "planes", "1, 2 or 3", planes);
    check(!per_token || planes == 1, op, "planes", "1 with a scale per token", planes);
    const IntegerGemm args = {weight,
                              required<void>(op, "x", x),
                              pointer<void>(bias),
                              required<void>(op, "y", y),
                              m,
                              parse_dtype(op, dtype),
                              planes,
                              per_token};
    const Isa isa = current_isa();
    check(integer_gemm_supported(isa, weight.k, weight.groups), op, "K / G",
          "a multiple of 32, and the instruction set above portable",
          std::to_string(weight.k / weight.groups) + " on " + isa_name(isa));
    py::gil_scoped_release release;
    integer_gemm(isa, threads, args);
}

void bind_tile_product(bool emulated, uintptr_t a, uintptr_t b, uintptr_t c, int m, int n, int k, int64_t stride_a,
                       int64_t stride_b, int64_t stride_c, bool add) {
    const char* op = "tile_product";
    const auto names = emulated ? emulated_isas() : available_isas();
    check(!names.empty() && names.back() == (emulated ? "amx_emulated" : "amx"), op, "emulated",
          "what this processor has", emulated);
    for (const auto& [name, size] : {std::pair<const char*, int>{"m", m}, {"n", n}, {"k", k}})
        check(1 <= size && size <= 16, op, name, "1 to 16", size);
    check(stride_a >= 4 * k, op, "stride_a", "4 * k or more", stride_a);
    check(stride_b >= 4 * n, op, "stride_b", "4 * n or more", stride_b);
    check(stride_c >= 4 * n, op, "stride_c", "4 * n or more", stride_c);
    const TileProduct args = {required<void>(op, "a", a),
                              required<void>(op, "b", b),
                              required<void>(op, "c", c),
                              m,
                              n,
                              k,
                              stride_a,
                              stride_b,
                              stride_c,
                              add};
    py::gil_scoped_release release;
    tile_product(emulated, args);
}

void bind_dequantize_panel(const PackedWeight& weight, int threads, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                           int64_t stride, const std::string& dtype, uintptr_t out) {
    const char* op = "dequantize_panel";
    check_size(op, "threads", threads);
    check(0 <= n0 && n0 < n1 && n1 <= weight.n && n0 % kPackedLanes == 0, op, "n0", "a multiple of 16 below n1 <= N",
          n0);
    check(0 <= k0 && k0 < k1 && k1 <= weight.k && k0 % kChunk == 0, op, "k0", "a multiple of 32 below k1 <= K", k0);
    check(stride >= ceil_div(n1 - n0, kPackedLanes) * kPackedLanes, op, "stride", "n1 - n0, rounded up to 16, or more",
          stride);
    check(dtype != "float16", op, "dtype", "float32 or bfloat16", dtype);
    const Panel panel = {n0, n1, k0, k1, stride, parse_dtype(op, dtype), required<void>(op, "out", out)};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    dequantize_panel(isa, threads, weight, panel);
}

void bind_repack_gptq(int threads, uintptr_t gptq, uintptr_t packed, int64_t n, int64_t k, int bits, bool to_gptq) {
    const char* op = "repack_gptq";
    check_size(op, "threads", threads);
    check_bits(op, bits);
    check_size(op, "n", n);
    check_size(op, "k", k);
    const Repack args = {
        required<int32_t>(op, "gptq", gptq), required<int32_t>(op, "packed", packed), n, k, bits, to_gptq};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    repack_gptq(isa, threads, args);
}

Tokens tokens_of(const char* op, uintptr_t x, const std::string& dtype, uintptr_t mask, int64_t tokens,
                 int64_t channels) {
    check_size(op, "tokens", tokens);
    check_size(op, "channels", channels);
    return {required<void>(op, "x", x), pointer<bool>(mask), tokens, channels, parse_dtype(op, dtype)};
}

int64_t bind_channel_statistics(int threads, uintptr_t x, const std::string& dtype, uintptr_t mask, int64_t tokens,
                                int64_t channels, uintptr_t mean, uintptr_t m2) {
    const char* op = "channel_statistics";
    check_size(op, "threads", threads);
    const Tokens input = tokens_of(op, x, dtype, mask, tokens, channels);
    auto *means = required<double>(op, "mean", mean), *m2s = required<double>(op, "m2", m2);
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    return channel_statistics(isa, threads, input, means, m2s);
}

double bind_channel_loss(int threads, uintptr_t x, const std::string& dtype, uintptr_t mask, int64_t tokens,
                         int64_t channels, uintptr_t mean_f, uintptr_t var_f, bool squared, uintptr_t mean_q,
                         uintptr_t var_q) {
    const char* op = "channel_loss";
    check_size(op, "threads", threads);
    const Tokens input = tokens_of(op, x, dtype, mask, tokens, channels);
    const auto *mf = required<float>(op, "mean_f", mean_f), *vf = required<float>(op, "var_f", var_f);
    auto *mq = required<float>(op, "mean_q", mean_q), *vq = required<float>(op, "var_q", var_q);
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    return channel_loss(isa, threads, input, mf, vf, squared, mq, vq);
}

void bind_channel_loss_backward(int threads, uintptr_t x, const std::string& dtype, uintptr_t mask, int64_t tokens,
                                int64_t channels, uintptr_t mean, uintptr_t offset, uintptr_t slope, uintptr_t grad_x) {
    const char* op = "channel_loss_backward";
    check_size(op, "threads", threads);
    const Tokens input = tokens_of(op, x, dtype, mask, tokens, channels);
    const TokenGradient gradient = {required<float>(op, "mean", mean), required<float>(op, "offset", offset),
                                    required<float>(op, "slope", slope), required<void>(op, "grad_x", grad_x)};
    const Isa isa = current_isa();
    py::gil_scoped_release release;
    channel_loss_backward(isa, threads, input, gradient);
}

}  // namespace
}  // namespace normtweak

PYBIND11_MODULE(_native, module) {
    using namespace normtweak;
    module.doc() = "normtweak's CPU kernels on raw tensor addresses; called by the ops' cpp_kernel.py only";
    module.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set that the kernels use");
    module.def("set_isa", &set_isa, py::arg("name"),
               "Use a lower instruction set; empty: what NORMTWEAK_ISA or the processor says");
    module.def("available_isas", &available_isas, "The instruction sets that this processor runs, slowest first");
    module.def("emulated_isas", &emulated_isas,
               "Instruction sets that set_isa and NORMTWEAK_ISA take though this processor lacks them, for tests");
    module.def("has_bfloat16", &has_bfloat16, "Whether the processor multiplies bfloat16 (AVX-512 or AMX)");
    module.def("has_amx", &has_amx, "Whether the processor multiplies tiles of bfloat16");
    module.def("group_params", &bind_group_params);
    module.def("gptq_block_update", &bind_gptq_block_update);
    module.def("gptq_solve", &bind_gptq_solve);
    module.def("inverse_cholesky", &bind_inverse_cholesky);
    module.def("hessian_update", &bind_hessian_update);
    module.def(
        "hessian_bfloat16", [] { return hessian_bfloat16(current_isa()); }, "Whether hessian_update takes bfloat16");
    py::class_<PackedWeight>(module, "PackedWeight", "The addresses and shape of a packed weight; doesn't own them")
        .def(py::init(&packed_weight), py::arg("words"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zeros"),
             py::arg("n"), py::arg("k"), py::arg("groups"), py::arg("bits"))
        .def_readonly("n", &PackedWeight::n)
        .def_readonly("k", &PackedWeight::k)
        .def_readonly("groups", &PackedWeight::groups)
        .def_readonly("bits", &PackedWeight::bits)
        .def("dequant_gemm_small", &bind_dequant_gemm_small)
        .def("integer_gemm", &bind_integer_gemm)
        .def("integer_gemm_supported",
             [](const PackedWeight& weight) { return integer_gemm_supported(current_isa(), weight.k, weight.groups); })
        .def("dequantize_panel", &bind_dequantize_panel);
    module.def("tile_product", &bind_tile_product, "One product of AMX's tiles, by the instructions or emulated");
    module.def("repack_gptq", &bind_repack_gptq);
    module.def("channel_statistics", &bind_channel_statistics);
    module.def("channel_loss", &bind_channel_loss);
    module.def("channel_loss_backward", &bind_channel_loss_backward);
}
