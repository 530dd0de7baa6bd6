"""dequant_gemm on the tensor cores of GPUs: forward, backward in x, and with activations of 8 bits.

The weight is the first operand of every product, y^T = W x^T: of the first operand alone Hopper's tensor cores (wgmma) read registers, and so
codes go from packed words to the product without a way through shared memory. Programs that share a sum over K write partial sums, which a
second kernel adds up: the same result every time, with nothing to be zeroed or locked, which sums by atomics wouldn't give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packing
from ..launch import DequantGemmGpu
from .triton_unpack import as_columns, as_rows, int8_of, packed_words, pairs_of, parameters_of, shifts_of, unpacking_tables, weights_of


@triton.jit
def _tile(m_blocks, n_blocks, GROUP_M: tl.constexpr):
    """Of the program's number its block of M and of N: GROUP_M blocks of M run side by side, so that caches hold what they share."""
    pid = tl.program_id(0)
    first = pid // (GROUP_M * n_blocks) * GROUP_M
    rows = tl.minimum(m_blocks - first, GROUP_M)
    inside = pid % (GROUP_M * n_blocks)
    return first + inside % rows, inside // rows


@triton.jit
def _add_remainder(
    acc, x_sums_ptrs, mask_m, scales_ptr, zeros_ptr, qweight_ptr, n, pid_k, M, N, K,
    SCALE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """acc + what products with code - 128 lack (int8_of): (128 - zero) times a group's sum of x. The parts of K take turns."""
    zero_shifts, scale_shifts = shifts_of(qweight_ptr, K, 8), shifts_of(qweight_ptr, K, SCALE_BITS)
    for group in range(pid_k, tl.cdiv(K, GROUP_SIZE) if GROUP_SIZE > 0 else 1, SPLIT_K):
        x_sum = tl.load(x_sums_ptrs + tl.cast(group, tl.int64) * M, mask=mask_m, other=0)[None, :]
        rest = 128 - (parameters_of(zeros_ptr, group * GROUP_SIZE, n, K, N, zero_shifts, GROUP_SIZE, 8, BLOCK_N, BLOCK_K) & 255)
        if GROUP_SIZE > 0:
            scales = parameters_of(scales_ptr, group * GROUP_SIZE, n, K, N, scale_shifts, GROUP_SIZE, SCALE_BITS, BLOCK_N, BLOCK_K)
            acc += rest.to(tl.float32) * scales.to(tl.float32) * x_sum.to(tl.float32)
        else:
            acc += rest * x_sum
    return acc


@triton.jit(do_not_specialize=["M"])
def dequant_gemm_fwd_kernel(
    x_ptr, qweight_ptr, scales_ptr, zeros_ptr, bias_ptr, x_scale_ptr, x_sums_ptr, y_ptr, M, N, K,
    BITS: tl.constexpr, PER: tl.constexpr, PER_HIGH: tl.constexpr, SCALE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x @ dequant(W)^T + bias, or with SPLIT_K > 1 its partial sums [SPLIT_K, M, N] without bias.

    GROUP_SIZE 0: a scale per channel. x int8: x_scale [M] is its rows' scale; x_sums [G, M], given for weights of 8 bits with zeros, are the sums over
    its groups. EVEN_K: BLOCK_K divides K.
    """
    pid_m, pid_n = _tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    pid_k = tl.program_id(1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER: tl.constexpr = dtype == tl.int8
    # Two products a step: the compiler then gives all warps rows of W, and no code is unpacked twice.
    HALF: tl.constexpr = BLOCK_K // 2
    # What is the fewer multiplications: of the weights, or of the products of a group.
    SCALE_WEIGHTS: tl.constexpr = GROUP_SIZE > 0 and not INTEGER and BLOCK_M > HALF
    SCALE_PRODUCTS: tl.constexpr = GROUP_SIZE > 0 and not SCALE_WEIGHTS

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_n = pid_n * BLOCK_N
    mask_m, mask_n = pid_m * BLOCK_M + offs_m < M, first_n + offs_n < N
    rows_left = tl.cdiv(N, 16) * 16 - first_n
    panel = tl.cdiv(K, 32) * (BITS * 16)
    x_ptr += pid_m.to(tl.int64) * BLOCK_M * K
    qweight_ptr += pid_n.to(tl.int64) * (BLOCK_N // 16) * panel
    offs_x = offs_m[None, :] * K + tl.arange(0, HALF)[:, None]
    tables = unpacking_tables(qweight_ptr, K, BITS, 4 if INTEGER else 2)

    zero_shifts = shifts_of(qweight_ptr, K, 8)
    if GROUP_SIZE > 0:
        scale_shifts = shifts_of(qweight_ptr, K, SCALE_BITS)
    elif zeros_ptr is not None:
        channel_zeros = parameters_of(zeros_ptr, 0, first_n, K, N, zero_shifts, 0, 8, BLOCK_N, HALF)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER and GROUP_SIZE == 0 else tl.float32)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    for step in range(pid_k * steps, tl.minimum((pid_k + 1) * steps, tl.cdiv(K, BLOCK_K))):
        for half in tl.static_range(2):
            k = step * BLOCK_K + half * HALF
            mask_x = mask_m[None, :]
            if not EVEN_K:
                mask_x = mask_x & (k + tl.arange(0, HALF) < K)[:, None]
            words = packed_words(qweight_ptr, panel, rows_left, k, K, tables, BITS, PER, PER_HIGH, BLOCK_N, HALF, False, EVEN_K)
            x = tl.load(x_ptr + k + offs_x, mask=mask_x, other=0)
            # Loaded once a step where both halves lie in one group.
            if GROUP_SIZE > 0 and (half == 0 or GROUP_SIZE % BLOCK_K != 0):
                scales = parameters_of(scales_ptr, k, first_n, K, N, scale_shifts, GROUP_SIZE, SCALE_BITS, BLOCK_N, HALF, False, EVEN_K)
                if zeros_ptr is not None:
                    group_zeros = parameters_of(zeros_ptr, k, first_n, K, N, zero_shifts, GROUP_SIZE, 8, BLOCK_N, HALF, False, EVEN_K)
            if zeros_ptr is not None:
                zeros = group_zeros if GROUP_SIZE > 0 else channel_zeros
            else:
                zeros = None
            if INTEGER:
                w = int8_of(words, zeros, tables, BITS)
            else:
                pairs = pairs_of(words, tables, BITS)
                w = tl.reshape(weights_of(pairs, zeros, scales if SCALE_WEIGHTS else None, tables, BITS, dtype), [BLOCK_N, HALF])
            if SCALE_PRODUCTS:
                if INTEGER:
                    tl.static_assert(HALF <= 256)
                    # Integers below 2^22, made float32 as bits of a mantissa: conversions run at a quarter of the rate or less.
                    product = tl.dot(w, x, tl.full([BLOCK_N, BLOCK_M], 0x4B400000, tl.int32), out_dtype=tl.int32)
                    product = product.to(tl.float32, bitcast=True) - 12582912.0
                else:
                    product = tl.dot(w, x)
                acc += product * scales.to(tl.float32)
            else:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32 if INTEGER else tl.float32)

    if x_sums_ptr is not None:
        x_sums_ptrs = x_sums_ptr + pid_m * BLOCK_M + offs_m
        acc = _add_remainder(
            acc, x_sums_ptrs, mask_m, scales_ptr, zeros_ptr, qweight_ptr, first_n, pid_k, M, N, K, SCALE_BITS, GROUP_SIZE, BLOCK_N, HALF, SPLIT_K
        )

    y = acc.to(tl.float32)
    if GROUP_SIZE == 0:
        scale_shifts = shifts_of(qweight_ptr, K, SCALE_BITS)
        y *= parameters_of(scales_ptr, 0, first_n, K, N, scale_shifts, 0, SCALE_BITS, BLOCK_N, BLOCK_K).to(tl.float32)
    if INTEGER:
        y *= tl.load(x_scale_ptr + pid_m * BLOCK_M + offs_m, mask=mask_m, other=0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0).to(tl.float32)[:, None]
    y_ptr += (pid_k.to(tl.int64) * M + pid_m * BLOCK_M) * N + first_n
    tl.store(y_ptr + (offs_m[None, :] * N + offs_n[:, None]), y.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit(do_not_specialize=["size"])
def dequant_gemm_sum_kernel(partial_ptr, bias_ptr, y_ptr, size, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum over the first dimension of partial [SPLIT_K, size] + bias, where size = M N."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT_K):
        y += tl.load(partial_ptr + part * size.to(tl.int64) + offs, mask=mask, other=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs % N, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def dequant_gemm_bwd_kernel(
    grad_ptr, qweight_ptr, scales_ptr, zeros_ptr, grad_x_ptr, M, N, K,
    BITS: tl.constexpr, PER: tl.constexpr, PER_HIGH: tl.constexpr, SCALE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """grad_x [M, K] = grad [M, N] @ dequant(W). GROUP_SIZE 0: a scale per channel. EVEN_N: BLOCK_N divides N."""
    pid_m, pid_k = _tile(tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    HALF: tl.constexpr = BLOCK_N // 2
    first_k = pid_k * BLOCK_K
    offs_m, offs_k, offs_h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, HALF)
    mask_m = pid_m * BLOCK_M + offs_m < M
    panel = tl.cdiv(K, 32) * (BITS * 16)
    grad_ptr += pid_m.to(tl.int64) * BLOCK_M * N
    offs_g = offs_m[None, :] * N + offs_h[:, None]
    tables = unpacking_tables(qweight_ptr, K, BITS, 2)
    zero_shifts, scale_shifts = shifts_of(qweight_ptr, K, 8), shifts_of(qweight_ptr, K, SCALE_BITS)

    acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for step in range(0, tl.cdiv(N, BLOCK_N)):
        for half in tl.static_range(2):
            n = step * BLOCK_N + half * HALF
            mask_n = n + offs_h < N
            mask_g = mask_m[None, :]
            if not EVEN_N:
                mask_g = mask_g & mask_n[:, None]
            grad = tl.load(grad_ptr + n + offs_g, mask=mask_g, other=0)
            panels = qweight_ptr + (n // 16).to(tl.int64) * panel
            words = packed_words(panels, panel, tl.cdiv(N, 16) * 16 - n, first_k, K, tables, BITS, PER, PER_HIGH, HALF, BLOCK_K, EVEN_N, False)
            zeros = None
            if zeros_ptr is not None:
                zeros = parameters_of(zeros_ptr, first_k, n, K, N, zero_shifts, GROUP_SIZE, 8, HALF, BLOCK_K, EVEN_N)
            scales = parameters_of(scales_ptr, first_k, n, K, N, scale_shifts, GROUP_SIZE, SCALE_BITS, HALF, BLOCK_K, EVEN_N)
            w = as_rows(weights_of(pairs_of(words, tables, BITS), zeros, scales, tables, BITS, dtype))
            acc = tl.dot(w, grad, acc)

    grad_x_ptr += pid_m.to(tl.int64) * BLOCK_M * K + first_k
    mask = mask_m[None, :] & (first_k + offs_k < K)[:, None]
    tl.store(grad_x_ptr + (offs_m[None, :] * K + offs_k[:, None]), as_columns(acc.to(dtype)), mask=mask)


@triton.jit
def quantize_tokens_kernel(x_ptr, x_int8_ptr, scale_ptr, K, BLOCK: tl.constexpr):
    """A row of x in int8, and its scale: the largest magnitude / 127, NaN where a value isn't finite."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    largest, spoilt = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        spoilt += x * 0.0  # NaN where x isn't finite
    scale = tl.div_rn(tl.max(largest, 0), 127.0) + tl.sum(spoilt, 0)
    tl.store(scale_ptr + row, scale)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0).to(tl.float32)
        # Below, float32 has no precision left (reference.quantize_activations). Adding 1.5 * 2^23 rounds to the nearest integer, halves to even.
        steps = tl.where(scale > 1.1754943508222875e-38, tl.div_rn(x, scale), 0.0)
        rounded = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(x_int8_ptr + row * K + k + offs, rounded.to(tl.int8), mask=k + offs < K)


def _group_size(k: int, groups: int) -> int:
    return 0 if groups == 1 else k // groups


def _in_words(parameters: Tensor | None) -> Tensor | None:
    """The scales or zeros [G, N] as int64, 2, 4 or 8 to each, where N and the address allow it."""
    if parameters is None or parameters.shape[1] * parameters.itemsize % 8 or parameters.data_ptr() % 8:
        return parameters
    return parameters.view(torch.int64)


def rows_per_load(bits: int, rows: int, columns: int, num_warps: int, by_twos: bool = True) -> dict[str, int]:
    """The kernels' PER and PER_HIGH for a tile of the weight: how many rows' words a load takes at a time.

    Two, where allowed, if one row's would leave a thread less than 8 bytes of the tile, the least that it should copy at once; each is then cut apart
    again. For AMD's GPUs the compiler lets every wavefront load what is then less than a word for each thread, so that nothing is won.
    """
    chunks = columns // packing.CHUNK
    words = {"PER": (2 if bits == 3 else bits) * chunks, "PER_HIGH": chunks}
    return {name: 2 if by_twos and rows * count < 2 * 32 * num_warps else 1 for name, count in words.items()}


def _by_twos(qweight: Tensor) -> bool:
    return qweight.data_ptr() % 8 == 0 and not torch.version.hip


def _divisor(block: int, size: int) -> int:
    """The largest power of two that divides `size`, and at most `block`; `block` for size 0."""
    return min(block, size & -size) if size else block


def _multiply(
    x: Tensor, x_scale: Tensor | None, x_sums: Tensor | None, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    bits: int, config: DequantGemmGpu, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m, k, (groups, n) = *x.shape, scales.shape
    group_size = _group_size(k, groups)
    # Halves of a step hold whole chunks of 32 and lie in one group.
    block_k = max(64, 2 * _divisor(config.block_k // 2, group_size))
    split_k = min(config.split_k, triton.cdiv(k, block_k))
    y = x.new_empty((m, n), dtype=dtype)
    out = y if split_k == 1 else x.new_empty((split_k, m, n), dtype=torch.float32)
    blocks = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    dequant_gemm_fwd_kernel[(blocks, split_k)](
        x, qweight, _in_words(scales), _in_words(zeros), bias if split_k == 1 else None, x_scale, x_sums, out, m, n, k,
        BITS=bits, **rows_per_load(bits, config.block_n, block_k // 2, config.num_warps, _by_twos(qweight)), SCALE_BITS=8 * scales.itemsize,
        GROUP_SIZE=group_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, SPLIT_K=split_k,
        GROUP_M=config.group_m, EVEN_K=k % block_k == 0, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if split_k > 1:
        grid = (triton.cdiv(m * n, SUM_BLOCK),)
        dequant_gemm_sum_kernel[grid](out, bias, y, m * n, n, SPLIT_K=split_k, BLOCK=SUM_BLOCK, num_warps=4, enable_fp_fusion=True)
    return y


# Values that a program of the sum over splits writes: 4 a thread, 16 bytes of float32, so that a warp reads whole sectors.
SUM_BLOCK = 512
# Values of a row that are quantized at once: 8 a thread.
QUANTIZE_BLOCK = 2048


def gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, config: DequantGemmGpu) -> Tensor:
    """x @ dequant(W)^T + bias: x float16 or bfloat16 [M, K], contiguous like all others; the rest as `dequant_gemm`. Returns [M, N]."""
    return _multiply(x, None, None, qweight, scales, zeros, bias, bits, config, x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (int8 [M, K], scale float32 [M]), x ~ int8 * scale, by `reference.quantize_activations`' rule for "int8_token"."""
    m, k = x.shape
    x_int8, scale = x.new_empty((m, k), dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    quantize_tokens_kernel[(m,)](x, x_int8, scale, k, BLOCK=QUANTIZE_BLOCK, num_warps=8, enable_fp_fusion=True)
    return x_int8, scale


def gemm_int8(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, config: DequantGemmGpu) -> Tensor:
    """As `gemm`, of x rounded to int8 by `quantize_tokens`; sums of integers, exact within a group.

    Raises ValueError where sums over one group may overflow int32.
    """
    (m, k), groups = x.shape, scales.shape[0]
    if bits == 8 and groups == 1 and k > 2**16:
        raise ValueError(f"gemm_int8: K must be at most 65536 for 8 bits and one group, got {k}")
    x_int8, x_scale = quantize_tokens(x)
    x_sums = x_int8.view(m, groups, -1).sum(2, dtype=torch.int32).t().contiguous() if bits == 8 and zeros is not None else None
    return _multiply(x_int8, x_scale, x_sums, qweight, scales, zeros, bias, bits, config, x.dtype)


def grad_x(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int, config: DequantGemmGpu) -> Tensor:
    """grad @ dequant(W): grad float16 or bfloat16 [M, N], contiguous. Returns [M, k]."""
    m, n = grad.shape
    group_size = _group_size(k, scales.shape[0])
    # A group whose size isn't a power of two isn't cut evenly by a block of several.
    block_k = config.block_k if group_size and config.block_k % group_size == 0 else _divisor(config.block_k, group_size)
    y = grad.new_empty((m, k))
    blocks = triton.cdiv(m, config.block_m) * triton.cdiv(k, block_k)
    dequant_gemm_bwd_kernel[(blocks,)](
        grad, qweight, _in_words(scales), _in_words(zeros), y, m, n, k,
        BITS=bits, **rows_per_load(bits, config.block_n // 2, block_k, config.num_warps, _by_twos(qweight)), SCALE_BITS=8 * scales.itemsize,
        GROUP_SIZE=group_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k,
        GROUP_M=config.group_m, EVEN_N=n % config.block_n == 0, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y
