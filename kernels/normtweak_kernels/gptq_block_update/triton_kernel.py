"""gptq_block_update on GPUs: one launch for 128 columns of all rows; the columns stay in registers while they are solved one after the other.

A warp has a row, each of its lanes four neighbouring columns. Lanes quantize a column each, side by side, of which one's turn it is: its error reaches
the others by one shuffle, the grid and U's diagonal are where they are wanted, and whatever is read in the loop is 16 bytes of U a lane. The
arithmetic is the definition's operation for operation (no fused multiply-add, IEEE divisions), so that codes are its codes; but for the order of the
sums in the clip search and in the product that passes the errors on to the columns behind the block. That product is torch's, in full float32, as
the reference's is: TF32 would put relative errors of 1e-3 into every later column.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import affine, gpu, registry
from ..launch import GPTQ_BLOCK_UPDATE_GPU, nearest_architecture
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
    d = (_quantize(w, scale, zero, LEVELS) - zero) * scale - w
    return tl.sum(tl.sum(tl.where(chosen, d * d, 0.0), axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _grid(w, chosen, factors_ptr, CLIP_STEPS: tl.constexpr, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """affine.grid of the chosen columns of w [N, L, 4], for each row: [N, 1, 1]."""
    values = tl.where(chosen, w, 0.0)
    if SYMMETRIC:
        high = tl.max(tl.max(tl.abs(values), axis=2, keep_dims=True), axis=1, keep_dims=True)
        low = -high
    else:
        high = tl.maximum(tl.max(tl.max(values, axis=2, keep_dims=True), axis=1, keep_dims=True), 0.0)
        low = tl.minimum(tl.min(tl.min(values, axis=2, keep_dims=True), axis=1, keep_dims=True), 0.0)
    scale, zero = _grid_at(low, high, 1.0, LEVELS, SYMMETRIC)
    if CLIP_STEPS > 0:
        best, least = tl.full(low.shape, 1.0, tl.float32), _grid_error(w, chosen, scale, zero, LEVELS)
        for step in range(0, CLIP_STEPS, 2):
            factors = tl.split(tl.load(factors_ptr + step + tl.arange(0, 2)[None, None, :]))
            for i in tl.static_range(2):
                factor = factors[i][:, :, None]
                scale, zero = _grid_at(low, high, factor, LEVELS, SYMMETRIC)
                error = _grid_error(w, chosen, scale, zero, LEVELS)
                best, least = tl.where(error < least, factor, best), tl.minimum(error, least)
        scale, zero = _grid_at(low, high, best, LEVELS, SYMMETRIC)
    return scale, zero


@triton.jit
def _column(x, COLUMN: tl.constexpr):
    """x[:, :, COLUMN] of x [N, L, 4], of which a thread has all four."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    first, second = tl.split(odd if COLUMN % 2 else even)
    return second if COLUMN >= 2 else first


@triton.jit
def _two_rows(hinv_ptr, k, start, width, j, lane, cols, BLOCK_N: tl.constexpr):
    """The rows of U for the block's columns j and j + 1, from the lane of j on; 1 where it isn't read, so that all can divide by it.

    Every row of the weight has its own pointers to U, so that every warp loads what its lanes need.
    """
    ptr = hinv_ptr + start + tl.zeros((BLOCK_N, 1, 1), tl.int32) + cols
    mask = (lane >= j // 4) & (cols < width)
    last = start + width - 1
    first, second = tl.minimum(start + j, last).to(tl.int64), tl.minimum(start + j + 1, last).to(tl.int64)
    return tl.load(ptr + first * k, mask=mask, other=1.0), tl.load(ptr + second * k, mask=mask, other=1.0)


@triton.jit
def gptq_block_update_fwd_kernel(
    weight_ptr, hinv_ptr, codes_ptr, scales_ptr, zeros_ptr, index_ptr, factors_ptr, errors_ptr, n, k, groups, group_size, start, width,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, FIND: tl.constexpr, FIRSTS: tl.constexpr, CLIP_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Columns [start, start + width) of BLOCK_N rows; errors [n, width] for the columns behind them.

    FIND: grids are found at each group's first column, a multiple of FIRSTS (1, 2 or 4), and stored; else they are those of index_ptr's group, or of
    the column's own for None.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    LANES: tl.constexpr = BLOCK_K // 4
    # Rows x lanes x the four columns that a lane has. Four columns are solved in turn, each in a register known when this is compiled.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane, place = tl.arange(0, LANES)[None, :, None], tl.arange(0, 4)[None, None, :]
    cols = 4 * lane + place
    rows = offs_n[:, None, None]
    block = (rows < n) & (cols < width)
    offsets = rows.to(tl.int64) * k + start + cols
    w = tl.load(weight_ptr + offsets, mask=block, other=0.0)
    if FIND:
        scale = tl.full((BLOCK_N, LANES, 4), 1.0, tl.float32)
        # What symmetric grids have: then the compiler keeps no register for it.
        zero = tl.full((BLOCK_N, LANES, 4), (LEVELS + 1) / 2, tl.float32)
        next_group = 0
    else:
        scale, zero = _known_grids(scales_ptr, zeros_ptr, index_ptr, n, groups, group_size, start, width, offs_n, BLOCK_N, BLOCK_K)
    diagonal = tl.full((BLOCK_N, LANES, 4), 1.0, tl.float32)
    for step in range(tl.cdiv(width, 4)):
        for i in tl.static_range(4):
            if FIND and i % FIRSTS == 0:
                j = 4 * step + i
                if j == next_group:
                    chosen = (cols >= j) & (cols < j + group_size)
                    found_scale, found_zero = _grid(w, chosen, factors_ptr, CLIP_STEPS, LEVELS, SYMMETRIC)
                    # The columns of later groups get theirs in turn.
                    scale, zero = tl.where(cols >= j, found_scale, scale), tl.where(cols >= j, found_zero, zero)
                    next_group += group_size
            if i % 2 == 0:
                u = _two_rows(hinv_ptr, k, start, width, 4 * step + i, lane, cols, BLOCK_N)
            # Every lane quantizes its i-th column; that of lane `step` is this one, and U's diagonal is in the row that it has anyway.
            diagonal = tl.where((lane == step) & (place == i), u[i % 2], diagonal)
            value, column_scale, column_zero = _column(w, i), _column(scale, i), _column(zero, i)
            quantized = (_quantize(value, column_scale, column_zero, LEVELS) - column_zero) * column_scale
            errors = tl.div_rn(value - quantized, _column(diagonal, i))
            error = tl.gather(errors, tl.zeros((BLOCK_N, LANES), tl.int32) + step, axis=1)[:, :, None]
            w = tl.where((lane > step) | ((lane == step) & (place > i)), w - error * u[i % 2], w)
    # A column isn't touched after its turn: what its turn gave is computed again, of all columns at once.
    codes = _quantize(w, scale, zero, LEVELS)
    quantized = (codes - zero) * scale
    tl.store(weight_ptr + offsets, quantized, mask=block)
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=block)
    tl.store(errors_ptr + rows.to(tl.int64) * width + cols, tl.div_rn(w - quantized, diagonal), mask=block)
    if FIND:
        # As they lie, with neighbouring rows beside each other; those of a group at its first column.
        column = tl.arange(0, BLOCK_K)[:, None]
        first = (column % group_size == 0) & (column < width) & (offs_n < n)[None, :]
        at = ((start + column) // group_size).to(tl.int64) * n + offs_n[None, :]
        tl.store(scales_ptr + at, tl.trans(tl.reshape(scale, [BLOCK_N, BLOCK_K])), mask=first)
        tl.store(zeros_ptr + at, tl.trans(tl.reshape(zero, [BLOCK_N, BLOCK_K])).to(tl.uint8), mask=first)


@triton.jit
def _known_grids(scales_ptr, zeros_ptr, index_ptr, n, groups, group_size, start, width, offs_n, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scale and zero of each column, [BLOCK_N, BLOCK_K / 4, 4]: read with neighbouring rows beside each other, as they lie."""
    cols = tl.arange(0, BLOCK_K)[:, None]
    if index_ptr is None:
        group = (start + cols) // group_size
    else:
        group = tl.load(index_ptr + start + cols + tl.zeros((1, BLOCK_N), tl.int32), mask=cols < width, other=-1)
    # A group that isn't there gives NaN, and reads nothing.
    known = (group >= 0) & (group < groups) & (offs_n < n)[None, :]
    at = group.to(tl.int64) * n + offs_n[None, :]
    scale = tl.trans(tl.load(scales_ptr + at, mask=known, other=float("nan")))
    zero = tl.trans(tl.load(zeros_ptr + at, mask=known, other=0).to(tl.float32))
    return tl.reshape(scale, [BLOCK_N, BLOCK_K // 4, 4]), tl.reshape(zero, [BLOCK_N, BLOCK_K // 4, 4])


def _clip_factors(clip_steps: int, device: torch.device) -> Tensor:
    """affine.grid's factors after the first, 1, rounded to float32 as torch does there; a 1 more, which changes nothing, where they are odd.

    Made on the device, as nothing may be copied to it within a graph.
    """
    steps = torch.arange(1, 2 * triton.cdiv(clip_steps, 2) + 1, dtype=torch.float64, device=device)
    # A tensor as divisor: by a number torch multiplies with its rounded inverse.
    factors = 1.0 - steps * (1.0 - affine.MIN_CLIP) / torch.full_like(steps, clip_steps)
    return torch.where(steps > clip_steps, 1.0, factors).float()


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
    launch = GPTQ_BLOCK_UPDATE_GPU[nearest_architecture(gpu.architecture(weight.device.index), GPTQ_BLOCK_UPDATE_GPU)]
    find = group_index is None and group_size <= launch.max_columns
    part = launch.max_columns // group_size * group_size if find else launch.max_columns
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
            gptq_block_update_fwd_kernel[(triton.cdiv(n, launch.block_rows),)](
                weight, hinv, codes, scales, zeros, group_index, factors, errors, n, k, groups, group_size, at, end - at,
                BITS=bits, SYMMETRIC=symmetric, FIND=find, FIRSTS=math.gcd(group_size, 4) if find else 4, CLIP_STEPS=clip_steps if find else 0,
                BLOCK_N=launch.block_rows, BLOCK_K=max(4, triton.next_power_of_2(end - at)),
                num_warps=launch.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
            weight[:, end:].addmm_(errors, hinv[at:end, end:], alpha=-1)
            at = end
