"""gptq_block_update on GPUs: one launch for 128 columns of all rows; the columns stay in registers while they are solved one after the other.

A warp has whole rows, its lanes the columns: memory is read and written in whole lines, and a column reaches all lanes by five shuffles. The
arithmetic is the definition's operation for operation (no fused multiply-add, IEEE divisions), so that codes are its codes; but for the order of the
sums in the clip search and in the product that passes the errors on to the columns behind the block. That product is torch's, in full float32, as
the reference's is: TF32 would put relative errors of 1e-3 into every later column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import affine, gpu, registry
from ..launch import GPTQ_BLOCK_UPDATE_GPU as LAUNCH
from ..precision import matmul_precision

_MIN_SCALE = tl.constexpr(affine.MIN_SCALE)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2**22: adding 1.5 * 2**23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize(w, scale, zero, LEVELS: tl.constexpr):
    # The first clamp moves no code, and keeps the rounding exact.
    steps = tl.minimum(tl.maximum(tl.div_rn(w, scale), -1024.0), 1024.0)
    return tl.minimum(tl.maximum(_round(steps) + zero, 0.0), LEVELS)


@triton.jit
def _grid_at(low, high, factor, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and zero of ranges [low, high] shrunk by a factor: affine.grid's `at`."""
    scale = tl.div_rn((high - low) * factor, LEVELS)
    scale = tl.minimum(tl.maximum(scale, _MIN_SCALE), 65504.0).to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        zero = tl.full(scale.shape, (LEVELS + 1) / 2, tl.float32)
    else:
        zero = tl.minimum(tl.maximum(_round(tl.div_rn(-low * factor, scale)), 0.0), LEVELS)
    return scale, zero


@triton.jit
def _grid_error(w, chosen, scale, zero, LEVELS: tl.constexpr):
    d = (_quantize(w, scale[:, None], zero[:, None], LEVELS) - zero[:, None]) * scale[:, None] - w
    return tl.sum(tl.where(chosen, d * d, 0.0), axis=1)


@triton.jit
def _grid(w, chosen, factors_ptr, CLIP_STEPS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """affine.grid of the chosen columns, for each row."""
    if SYMMETRIC:
        high = tl.max(tl.where(chosen, tl.abs(w), 0.0), axis=1)
        low = -high
    else:
        high = tl.max(tl.where(chosen, w, 0.0), axis=1)
        low = tl.min(tl.where(chosen, w, 0.0), axis=1)
    scale, zero = _grid_at(low, high, 1.0, LEVELS, SYMMETRIC)
    if CLIP_STEPS > 0:
        best = _grid_error(w, chosen, scale, zero, LEVELS)
        for step in range(1, CLIP_STEPS + 1):
            new_scale, new_zero = _grid_at(low, high, tl.load(factors_ptr + step), LEVELS, SYMMETRIC)
            error = _grid_error(w, chosen, new_scale, new_zero, LEVELS)
            better = error < best
            best = tl.where(better, error, best)
            scale = tl.where(better, new_scale, scale)
            zero = tl.where(better, new_zero, zero)
    return scale, zero


@triton.jit
def gptq_block_update_fwd_kernel(
    weight_ptr, hinv_ptr, codes_ptr, scales_ptr, zeros_ptr, index_ptr, factors_ptr, errors_ptr, n, k, groups, group_size, start, width,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, FIND: tl.constexpr, CLIP_STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Columns [start, start + width) of BLOCK_N rows; errors [n, width] for the columns behind them.

    FIND: grids are found at each group's first column and stored; else they are those of index_ptr's group, or of the column's own for None.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    row, col = offs_n < n, cols < width
    block = row[:, None] & col[None, :]
    offsets = offs_n[:, None].to(tl.int64) * k + start + cols[None, :]
    w = tl.load(weight_ptr + offsets, mask=block, other=0.0)
    # Every row has its own pointers to U, so that every warp loads what its lanes need.
    offs_u = tl.zeros((BLOCK_N, 1), tl.int32) + cols[None, :]
    errors = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    codes = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    current = -1
    for j in range(width):
        column = start + j
        u_row = hinv_ptr + column.to(tl.int64) * k
        u = tl.load(u_row + start + offs_u, mask=col[None, :], other=0.0)
        diagonal = tl.load(u_row + column)
        group = column // group_size if index_ptr is None else tl.load(index_ptr + column)
        if group != current:
            current = group
            at = group.to(tl.int64) * n + offs_n
            if FIND:
                chosen = (cols >= j) & (cols < j + group_size)
                scale, zero = _grid(w, chosen[None, :], factors_ptr, CLIP_STEPS, LEVELS, SYMMETRIC)
                tl.store(scales_ptr + at, scale, mask=row)
                tl.store(zeros_ptr + at, zero.to(tl.uint8), mask=row)
            else:
                # A group that isn't there gives NaN, and reads nothing.
                known = offs_n < tl.where((group >= 0) & (group < groups), n, 0)
                scale = tl.load(scales_ptr + at, mask=known, other=float("nan"))
                zero = tl.load(zeros_ptr + at, mask=known, other=0).to(tl.float32)
        here = cols[None, :] == j
        value = tl.sum(tl.where(here, w, 0.0), axis=1)
        code = _quantize(value, scale, zero, LEVELS)
        quantized = (code - zero) * scale
        error = tl.div_rn(value - quantized, diagonal)
        w = tl.where(here, quantized[:, None], tl.where(cols[None, :] > j, w - error[:, None] * u, w))
        codes = tl.where(here, code[:, None], codes)
        errors = tl.where(here, error[:, None], errors)
    tl.store(weight_ptr + offsets, w, mask=block)
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=block)
    tl.store(errors_ptr + offs_n[:, None].to(tl.int64) * width + cols[None, :], errors, mask=block)


def _clip_factors(clip_steps: int, device: torch.device) -> Tensor:
    """affine.grid's factors, rounded to float32 as torch does there; made on the device, as nothing may be copied to it within a graph."""
    steps = torch.arange(clip_steps + 1, dtype=torch.float64, device=device)
    # A tensor as divisor: by a number torch multiplies with its rounded inverse.
    return (1.0 - steps * (1.0 - affine.MIN_CLIP) / torch.full_like(steps, clip_steps)).float()


@registry.register("gptq_block_update", "triton", gpu.refuses)
def gptq_block_update(
    weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None,
    start: int, stop: int, bits: int, symmetric: bool, clip_steps: int,
) -> None:  # fmt: skip
    """See the package's docstring. A block of more columns than a launch takes is solved in parts, which move the result by rounding only.

    A group index out of range isn't noticed, which would wait for the device: the columns' weights become NaN.
    """
    n, k = weight.shape
    groups = scales.shape[0]
    group_size = k // groups
    if n == 0:
        return
    find = group_index is None and group_size <= LAUNCH.max_columns
    part = LAUNCH.max_columns // group_size * group_size if find else LAUNCH.max_columns
    with gpu.on_device_of(weight), matmul_precision("highest"):
        group_index = None if group_index is None else group_index.contiguous()
        factors = _clip_factors(clip_steps, weight.device) if find and clip_steps else None
        at = start
        while at < stop:
            end = min(at + part, stop)
            if group_index is None and not find:
                # Groups wider than a launch: a part ends where its group does.
                group = at // group_size
                end = min(end, (group + 1) * group_size)
                if at % group_size == 0:
                    found = torch.ops.normtweak.group_params(weight[:, at : at + group_size], None, group_size, bits, symmetric, clip_steps)
                    scales[group], zeros[group] = found[0][0], found[1][0]
            errors = torch.empty(n, end - at, dtype=torch.float32, device=weight.device)
            gptq_block_update_fwd_kernel[(triton.cdiv(n, LAUNCH.block_rows),)](
                weight, hinv, codes, scales, zeros, group_index, factors, errors, n, k, groups, group_size, at, end - at,
                BITS=bits, SYMMETRIC=symmetric, FIND=find, CLIP_STEPS=clip_steps if find else 0, BLOCK_N=LAUNCH.block_rows, BLOCK_K=triton.next_power_of_2(end - at),
                num_warps=LAUNCH.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
            weight[:, end:].addmm_(errors, hinv[at:end, end:], alpha=-1)
            at = end
