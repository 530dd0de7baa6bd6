"""dequant_gemm on a GPU for up to 8 rows of x: bound by reading the weight, each word of which is read once, in 16-byte loads.

A program computes 16 columns of y over the whole of K. Four neighbouring threads hold the 16 lanes of a word row, four each; the rows of
threads take half a chunk of 32 codes each, in two runs of eight (k = 16p + 8h + 0..7 for the half h and the run p), so that the rows of a chunk
read neighbouring words and neighbouring values of x. There is no product of the tensor cores, and no shared memory before the last sum.

The sum over K is split among the threads of a program, not among programs: the layout gives N/16 programs, enough to fill a GPU from
N = 2048 on. Below that the whole weight takes a microsecond or two, no longer than the second launch that adding up parts of
different programs would cost. The order of the sum is fixed, so that the result is the same in every run.

A code is turned into the float32 v = 2**e + code by cutting it out of its word into the mantissa of that power of two, and
    sum x (code - zero) scale = scale (sum x v - (2**e + zero) sum x)
is corrected once for the codes that share a scale. The two rows of four codes that a thread takes of a word come to lie at two places of
mantissas with one shift, with an e of 8 at most: what v has more than the code costs the sum few of float32's bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packing
from ..launch import DequantGemvGpu

MAX_ROWS = 8
# Lanes of a wavefront, what AMD's data-centre GPUs have in place of a warp of 32.
WAVEFRONT = 64


@triton.jit
def _place(BITS: tl.constexpr, ROW: tl.constexpr):
    """The bit of a float32's mantissa that a code's lowest bit comes to, of its row 0 or 1."""
    place: tl.constexpr = 15 if BITS == 8 else 19 + 2 * ROW if BITS == 2 else 15 + 4 * ROW
    return place


@triton.jit
def _moved(word, RIGHT: tl.constexpr):
    return word >> RIGHT if RIGHT >= 0 else word << -RIGHT


@triton.jit
def _code(low, high, power, ROW: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr):
    """Code k = 4 ROW + BYTE plus 2**(23 - place), the power whose bits in float32 are `power`."""
    PLACE: tl.constexpr = _place(BITS, ROW)
    if BITS == 8:
        moved = _moved(low if ROW == 0 else high, 8 * BYTE - PLACE)
    else:
        moved = _moved(low, 8 * BYTE + (2 if BITS == 2 else 4) * ROW - PLACE)
    bits = (moved & (((1 << BITS) - 1) << PLACE)) | power
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _words(weight_ptrs, chunk, half, RUN: tl.constexpr, BITS: tl.constexpr):
    """The words of a run of eight codes of a chunk's half, shifted so that no position in them depends on the half."""
    if BITS == 8:
        low = tl.load(weight_ptrs + ((chunk * 8 + 4 * RUN + 2 * half) * 16)[:, None, None])
        high = tl.load(weight_ptrs + ((chunk * 8 + 4 * RUN + 2 * half + 1) * 16)[:, None, None])
    elif BITS == 4:
        low = tl.load(weight_ptrs + ((chunk * 4 + 2 * RUN + half) * 16)[:, None, None])
        high = low
    else:
        low = tl.load(weight_ptrs + ((chunk * BITS + RUN) * 16)[:, None, None]) >> (4 * half)[:, None, None]
        high = low
        if BITS == 3:
            high = tl.load(weight_ptrs + ((chunk * 3 + 2) * 16)[:, None, None]) >> (4 * RUN + 2 * half)[:, None, None]
            # The two rows of the run as those of 4 bits, the low two bits of each and their high one.
            low = (low & 0x03030303) | ((low << 2) & 0x30303030) | ((high << 2) & 0x04040404) | ((high << 5) & 0x40404040)
    return low, high


@triton.jit
def _accumulate(acc, low, high, power, x, ROW: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr):
    """acc + the products of a row's four codes with the four values of x."""
    for BYTE in tl.static_range(4):
        value = _code(low, high, power, ROW, BYTE, BITS)
        if CENTRE:
            value -= 2.0 ** (23 - _place(BITS, ROW)) + 2.0 ** (BITS - 1)
        acc += value[None] * x[BYTE][:, :, :, None]
    return acc


@triton.jit
def _columns(x):
    """The eight values along the last axis, each by itself."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 4, 4, 2]))
    k04, k26 = tl.split(tl.reshape(even, [x.shape[0], x.shape[1], 4, 2, 2]))
    k15, k37 = tl.split(tl.reshape(odd, [x.shape[0], x.shape[1], 4, 2, 2]))
    k0, k4 = tl.split(k04)
    k1, k5 = tl.split(k15)
    k2, k6 = tl.split(k26)
    k3, k7 = tl.split(k37)
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def dequant_gemv_fwd_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    GROUP_CHUNKS: tl.constexpr,
    TAIL: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    THREAD_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """y [M, N] = x [M, K] @ dequant(W)^T + bias; program i computes columns 16i to 16i + 15.

    GROUP_CHUNKS: chunks of a group, 0 for one group. TAIL: K ends within a chunk. THREAD_ROWS: four threads each, two share a chunk. CHUNKS, a
    divisor of GROUP_CHUNKS (of all chunks for one group): chunks unpacked between two scalings. CENTRE: v is made code - 2**(BITS - 1) first.
    """
    tile = tl.program_id(0)
    chunks = tl.cdiv(K, 32)
    offs_r = tl.arange(0, THREAD_ROWS)
    half = offs_r % 2
    lane = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    offs_n = tile * 16 + lane
    mask_n = offs_n < N
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = (8 * half)[:, None, None] + tl.zeros([4], tl.int32)[None, :, None] + tl.arange(0, 8)[None, None, :]
    weight_ptrs = qweight_ptr + tile.to(tl.int64) * chunks * (BITS * 16) + lane[None]
    # Rows past the last one repeat it, and what they sum is not stored; so do chunks, and their scales are zero. No load waits for a mask.
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None, None, None] * K + offs_k[None]

    # As if they were loaded: known to be constant, setting them beside a code would take an instruction of its own.
    power = tl.load(qweight_ptr, mask=K < 0, other=(150 - _place(BITS, 0)) << 23)
    power_1 = tl.load(qweight_ptr, mask=K < 0, other=(150 - _place(BITS, 1)) << 23)

    acc = tl.zeros([BLOCK_M, THREAD_ROWS, 4, 4], tl.float32)
    BLOCK_C: tl.constexpr = THREAD_ROWS // 2 * CHUNKS
    for start in range(0, chunks, BLOCK_C):
        first = start + offs_r // 2 * CHUNKS
        inside = first < chunks
        first = tl.minimum(first, chunks - CHUNKS)
        part = tl.zeros([BLOCK_M, THREAD_ROWS, 4, 4], tl.float32)
        x_sum = tl.zeros([BLOCK_M, THREAD_ROWS, 4], tl.float32)
        x_sum_1 = x_sum
        for step in tl.static_range(2 * CHUNKS):
            chunk, run = first + step // 2, step % 2
            low, high = _words(weight_ptrs, chunk, half, run, BITS)
            at_k = (chunk * 32 + 16 * run)[:, None, None]
            if TAIL:
                x = tl.load(x_ptrs + at_k[None], mask=(at_k + offs_k < K)[None], other=0.0).to(tl.float32)
            else:
                x = tl.load(x_ptrs + at_k[None]).to(tl.float32)
            x_sum += tl.sum(x, 3)
            # Adding -0 changes no number, and so the compiler leaves it out.
            x_sum_1 += tl.sum(tl.where(tl.arange(0, 8)[None, None, None, :] < 4, -0.0, x), 3)
            k0, k1, k2, k3, k4, k5, k6, k7 = _columns(x)
            part = _accumulate(part, low, high, power, (k0, k1, k2, k3), 0, BITS, CENTRE)
            part = _accumulate(part, low, high, power_1, (k4, k5, k6, k7), 1, BITS, CENTRE)
        group = first // GROUP_CHUNKS if GROUP_CHUNKS else first * 0
        at = group[:, None, None] * N + offs_n[None]
        mask = inside[:, None, None] & mask_n[None]
        scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if zeros_ptr is None:
            zero = 2.0 ** (BITS - 1)
        else:
            zero = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)[None]
        if CENTRE:
            part -= x_sum[:, :, :, None] * (zero - 2.0 ** (BITS - 1))
        else:
            # Of row 0 all, of row 1 what its power has less.
            less = 2.0 ** (23 - _place(BITS, 0)) - 2.0 ** (23 - _place(BITS, 1))
            part += (x_sum_1 * less)[:, :, :, None] - x_sum[:, :, :, None] * (zero + 2.0 ** (23 - _place(BITS, 0)))
        acc += part * scale[None]
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None]
    at = offs_m[:, None, None] * N + offs_n[None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None, None] & mask_n[None])


def chunks_per_thread(wanted: int, run: int, bits: int, rows: int) -> int:
    """How many chunks of K a thread takes at a time: a divisor of a run of chunks with one scale. One where sums leave no registers for more."""
    return 1 if bits == 3 and rows > 2 else math.gcd(wanted, run)


def gemv(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, config: DequantGemvGpu, dtype: torch.dtype
) -> Tensor:
    """x [M, K] @ dequant(W)^T + bias for M of at most 8, in `dtype`, [M, N].

    x and bias float16, bfloat16 or float32, scales [G, N] float16 or float32 with one group or groups of a multiple of 32, zeros uint8 [G, N] or
    None; all contiguous, and neither empty.
    """
    (m, k), (groups, n) = x.shape, scales.shape
    chunks = -(-k // packing.CHUNK)
    group_chunks = 0 if groups == 1 else k // groups // packing.CHUNK
    per_thread = chunks_per_thread(config.chunks, group_chunks or chunks, bits, m)
    rows_per_warp = WAVEFRONT // 4 if torch.version.hip else 8
    # A program's threads are no more than there are chunks for.
    num_warps = min(config.num_warps, triton.next_power_of_2(triton.cdiv(2 * chunks, rows_per_warp * per_thread)))
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    dequant_gemv_fwd_kernel[(qweight.shape[0],)](
        x,
        qweight,
        scales,
        zeros,
        bias,
        y,
        m,
        n,
        k,
        GROUP_CHUNKS=group_chunks,
        TAIL=k % packing.CHUNK != 0,
        BITS=bits,
        BLOCK_M=triton.next_power_of_2(m),
        THREAD_ROWS=rows_per_warp * num_warps,
        CHUNKS=per_thread,
        # Of float32 all bits count: little cancels then, for one more instruction a code.
        CENTRE=x.dtype == torch.float32,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return y
