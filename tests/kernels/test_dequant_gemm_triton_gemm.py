"""dequant_gemm's Triton kernels for tensor cores: forward, backward in x, and int8 activations."""

import itertools

import pytest
import torch

from accuracy import assert_accurate, random_weight
from normtweak_kernels import packing
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from normtweak_kernels.dequant_gemm.triton_gemm import gemm, gemm_int8, grad_x, quantize_tokens
from normtweak_kernels.launch import DEQUANT_GEMM_GPU, DequantGemmGpu
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

OUTPUTS = {
    "dequant_gemm_fwd_kernel": {"y_ptr"},
    "dequant_gemm_sum_kernel": {"y_ptr"},
    "dequant_gemm_bwd_kernel": {"grad_x_ptr"},
    "quantize_tokens_kernel": {"x_int8_ptr", "scale_ptr"},
}
# (M, N, K, group size): none that a tile divides, K that ends within a chunk of 32 and at no multiple of 16, groups that are no power of two.
SHAPES = [(1, 80, 192, -1), (3, 200, 576, 64), (17, 80, 192, 32), (17, 24, 72, -1), (3, 80, 384, 128), (33, 33, 288, 96)]
# Of 16 rows the products are scaled, of 64 the weights; K in two and three parts, the last of them shorter or empty.
CONFIGS = [
    DequantGemmGpu(block_m=16, block_n=32, block_k=64, split_k=2, num_stages=2),
    DequantGemmGpu(block_m=64, block_n=64, block_k=128, group_m=2, num_stages=2),
    DequantGemmGpu(block_m=32, block_n=64, block_k=128, split_k=3, num_stages=3),
]
SCALES = [torch.float16, torch.float32]
symmetry = pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
each_bits = pytest.mark.parametrize("bits", packing.BITS)
each_capability = pytest.mark.parametrize("capability", CAPABILITIES)
# Which of several configurations and types of scale goes with which shape, so that all pairs meet in one test.
CASES = list(zip(SHAPES, itertools.cycle(CONFIGS), itertools.cycle(SCALES)))


def check_forward(shape, bits, zeros, dtype, config, scale_dtype, context):
    m, n, k, group_size = shape
    weight = random_weight(n, k, bits, group_size, zeros=zeros, scale_dtype=scale_dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if m != 3 else None
    with context as reports:
        y = gemm(x, weight.pack(), weight.scales, weight.zeros, bias, bits, config)
    plain = torch.nn.functional.linear(x, weight.dequantize().to(dtype), bias)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float64), None if bias is None else bias.double())
    assert_accurate(y, plain, exact)
    return reports


def check_backward(shape, bits, zeros, dtype, config, scale_dtype, context):
    m, n, k, group_size = shape
    weight = random_weight(n, k, bits, group_size, zeros=zeros, scale_dtype=scale_dtype)
    grad = torch.randn(m, n).to(dtype)
    with context as reports:
        result = grad_x(grad, weight.pack(), weight.scales, weight.zeros, bits, k, config)
    assert_accurate(result, grad @ weight.dequantize().to(dtype), grad.double() @ weight.dequantize(torch.float64))
    return reports


def check_int8(shape, bits, zeros, dtype, config, scale_dtype, context):
    m, n, k, group_size = shape
    weight = random_weight(n, k, bits, group_size, zeros=zeros, scale_dtype=scale_dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    with context as reports:
        y = gemm_int8(x, weight.pack(), weight.scales, weight.zeros, bias, bits, config)
    rounded = quantize_activations(x.float(), 1, "int8_token").double()
    plain = torch.nn.functional.linear(rounded.to(dtype), weight.dequantize().to(dtype), bias)
    assert_accurate(y, plain, torch.nn.functional.linear(rounded, weight.dequantize(torch.float64), bias.double()))
    return reports


CHECKS = [check_forward, check_backward, check_int8]
each_check = pytest.mark.parametrize("check", CHECKS, ids=["forward", "backward", "int8"])


@each_check
@symmetry
@each_bits
@pytest.mark.parametrize(("shape", "config", "scale_dtype"), CASES)
def test_interpreter(shape, config, scale_dtype, bits, zeros, check):
    check(shape, bits, zeros, torch.float16, config, scale_dtype, interpreted())


@pytest.mark.ptx
@each_check
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_capability
@each_bits
def test_simulator(bits, capability, dtype, check):
    # Each starts elsewhere in the cases: all shapes, both symmetries and both types of scale meet each kernel.
    at = packing.BITS.index(bits) + 2 * CHECKS.index(check) + 3 * (dtype == torch.bfloat16) + CAPABILITIES.index(capability)
    shape, config, scale_dtype = CASES[at % len(CASES)]
    check(shape, bits, bool((at + (dtype == torch.bfloat16)) % 2), dtype, config, scale_dtype, simulated(capability, OUTPUTS))


@pytest.mark.ptx
@pytest.mark.slow
@each_check
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_capability
@symmetry
@each_bits
@pytest.mark.parametrize(("shape", "config", "scale_dtype"), CASES)
def test_simulator_everything(shape, config, scale_dtype, bits, zeros, capability, dtype, check):
    check(shape, bits, zeros, dtype, config, scale_dtype, simulated(capability, OUTPUTS))


@pytest.mark.ptx
@each_check
@each_capability
@each_bits
def test_memory_is_read_in_whole_sectors_and_without_conflicts(bits, capability, check):
    """In the launches that run untuned: two tiles along the sum, as many groups in one as there may be."""
    lists = DEQUANT_GEMM_GPU[f"sm_{capability}"]
    config = {check_forward: lists.products(bits, 4), check_backward: lists.gradients(bits, 4), check_int8: lists.int8}[check][0]
    shape = (config.block_m, 2 * config.block_n, config.block_k, 32) if check is check_backward else (config.block_m, config.block_n, 256, 64)
    reports = check(shape, bits, True, torch.float16, config, torch.float16, simulated(capability, OUTPUTS))
    assert_coalesced(reports)
    copied = [row for report in reports for row in report.access_table() if row[1].startswith("cp.async")]
    assert copied, "x and the words are copied asynchronously"


def test_partial_sums_are_added_in_one_order():
    weight = random_weight(40, 512, 4, 64, zeros=True)
    x = torch.randn(5, 512).half()
    config = DequantGemmGpu(block_m=16, block_n=32, block_k=64, split_k=8)
    with interpreted():
        first, second = (gemm(x, weight.pack(), weight.scales, weight.zeros, None, 4, config) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_waits_for_the_device():
    weight = random_weight(40, 512, 4, 64, zeros=True)
    packed, x = (weight.pack(), weight.scales, weight.zeros), torch.randn(5, 512).half()
    with only_launched() as names:
        gemm(x, *packed, None, 4, CONFIGS[0])
        gemm_int8(x, *packed, None, 4, CONFIGS[1])
        grad_x(x[:, :40].contiguous(), *packed, 4, 512, CONFIGS[1])
    fwd = "dequant_gemm_fwd_kernel"
    assert names == [fwd, "dequant_gemm_sum_kernel", "quantize_tokens_kernel", fwd, "dequant_gemm_bwd_kernel"]


@pytest.mark.parametrize("k", [64, 80, 3000])
def test_tokens_are_quantized_as_the_reference_does(k):
    x = torch.randn(7, k) * torch.tensor([1.0, 1e-30, 0, 1e30, 1, 1, 1e-39])[:, None]
    x[0, :3] = torch.tensor([127.0, 0.5, 1.5])  # a row whose largest value is 127 has halves that round to even
    x[0, 3:] = 2.5
    x[4, k // 2], x[5, k - 1] = torch.nan, torch.inf
    with interpreted():
        x_int8, scale = quantize_tokens(x)
    expected = quantize_activations(x, 1, "int8_token")
    assert torch.equal(scale.isnan(), expected.isnan().any(1))
    good = [0, 1, 2, 3, 6]
    assert torch.equal((x_int8 * scale[:, None])[good], expected[good])


def test_sums_of_bytes_that_would_overflow_are_refused():
    x = torch.zeros(1, 2**16 + 32).half()
    weight = random_weight(16, x.shape[1], 8, -1, zeros=False)
    with pytest.raises(ValueError, match="gemm_int8: K must be at most 65536"):
        gemm_int8(x, weight.pack(), weight.scales, None, None, 8, CONFIGS[0])
