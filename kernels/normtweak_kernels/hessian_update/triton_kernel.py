"""hessian_update on GPUs: the tiles of the lower triangle, each the product of two strips of channels over all tokens.

Products of 16-bit values are exact and summed in float32 on tensor cores. float32 values are multiplied there too: cut into three bfloat16 values each,
whose six larger products (bf16x6) leave a relative error of 2**-22, less than summing a few tokens in float32 does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu, registry
from ..launch import hessian_update_gpu

# bf16x6 has twice the static ceiling of three products of TF32, which older versions of Triton have on NVIDIA's GPUs alone.
_FLOAT32 = "bf16x6" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else "ieee" if torch.version.hip else "tf32x3"


@triton.jit
def hessian_update_fwd_kernel(
    hessian_ptr, x_ptr, tokens, k, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Adds x^T x to one tile on or below the diagonal, whole: above the diagonal anything may stand. Programs above it have nothing to do."""
    tile_i, tile_j = tl.program_id(1), tl.program_id(0)
    if tile_j <= tile_i:
        offs_i = tile_i * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_j = tile_j * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_t = tl.arange(0, BLOCK_T)
        # The left operand is read transposed: a transposition of what was read keeps sm_80 from copying it asynchronously.
        left = x_ptr + offs_t[None, :].to(tl.int64) * k + offs_i[:, None]
        right = x_ptr + offs_t[:, None].to(tl.int64) * k + offs_j[None, :]
        total = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            inside = start + offs_t < tokens
            x_i = tl.load(left, mask=inside[None, :] & (offs_i < k)[:, None], other=0.0)
            x_j = tl.load(right, mask=inside[:, None] & (offs_j < k)[None, :], other=0.0)
            total = tl.dot(x_i, x_j, total, input_precision=PRECISION)
            left += tl.cast(k, tl.int64) * BLOCK_T
            right += tl.cast(k, tl.int64) * BLOCK_T
        at = hessian_ptr + offs_i[:, None].to(tl.int64) * k + offs_j[None, :]
        block = (offs_i < k)[:, None] & (offs_j < k)[None, :]
        tl.store(at, tl.load(at, mask=block, other=0.0) + total, mask=block)


@registry.register("hessian_update", "triton", gpu.refuses)
def hessian_update(hessian: Tensor, x: Tensor) -> None:
    """See the package's docstring."""
    tokens, k = x.shape
    if tokens == 0 or k == 0:
        return
    x, launch = x.contiguous(), hessian_update_gpu(k)
    tiles = triton.cdiv(k, launch.block_channels)
    with gpu.on_device_of(x):
        hessian_update_fwd_kernel[(tiles, tiles)](
            hessian, x, tokens, k, PRECISION=_FLOAT32 if x.dtype == torch.float32 else "ieee", BLOCK_K=launch.block_channels,
            BLOCK_T=launch.block_tokens_float32 if x.dtype == torch.float32 else launch.block_tokens,
            num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
