"""channel_loss on GPUs: each direction reads x once. Statistics are made in two stages, of tiles and of all tiles, in float32.

A tile's mean and sum of squared deviations are found by the corrected two-pass algorithm (Chan, Golub and LeVeque, "Algorithms for computing
the sample variance", 1983) on values that stay in registers: with a rough mean a, d = x - a and n values,
    mean = a + sum(d) / n,   m2 = sum(d**2) - sum(d)**2 / n.
Tiles and strips of tiles are merged by the same formula, d being the distance of a part's mean from the rough one, weighted by the part's n. A mean is
kept as rough mean and correction, which together are more exact than one float32: neither a mean that is large beside the deviation nor a massive
token costs precision. No sum depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu, registry
from ..launch import CHANNEL_LOSS_GPU as LAUNCH


@triton.jit
def _kept(mask_ptr, first, tokens, BLOCK_T: tl.constexpr):
    """BLOCK_T tokens from `first`, a multiple of BLOCK_T, on, and which of them count.

    Where the mask comes as words of 64 bits the tokens are eight apart: those that a thread has in its registers are neighbours, and share a word.
    """
    offs = tl.arange(0, BLOCK_T)
    if mask_ptr is not None and mask_ptr.dtype.element_ty == tl.int64:
        WORDS: tl.constexpr = BLOCK_T // 8
        offs_t = first + offs % WORDS * 8 + offs // WORDS
        at = first // 8 + tl.arange(0, WORDS)
        words = tl.load(mask_ptr + at, mask=at < tokens // 8, other=0)
        keep = (offs_t < tokens) & (tl.reshape((words[None, :] >> 8 * tl.arange(0, 8)[:, None]) & 255, [BLOCK_T]) != 0)
    else:
        offs_t = first + offs
        keep = offs_t < tokens
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + offs_t, mask=keep, other=0) != 0)
    return offs_t, keep


@triton.jit
def channel_partials_fwd_kernel(
    x_ptr, mask_ptr, counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, tokens, channels, tiles,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of a strip of `tiles` tiles of tokens: how many count [strips], each channel's rough mean, its correction and m2 [strips, channels].

    Neighbouring programs have the same tokens, so that rows are read whole. Where no token counts, all is 0.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    strip = (tl.program_id(0) // blocks_c).to(tl.int64)
    offs_c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    count = 0
    rough = tl.zeros((BLOCK_C,), tl.float32)
    correction = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        offs_t, keep = _kept(mask_ptr, (strip * tiles + tile) * BLOCK_T, tokens, BLOCK_T)
        added = tl.sum(keep.to(tl.int32), axis=0)
        inverse = tl.div_rn(1.0, tl.maximum(added, 1).to(tl.float32))
        x = tl.load(x_ptr + offs_t[:, None] * channels + offs_c[None, :], mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tile_rough = tl.sum(x, axis=0) * inverse
        d = tl.where(keep[:, None], x - tile_rough[None, :], 0.0)
        total = tl.sum(d, axis=0)
        tile_correction = total * inverse
        tile_m2 = tl.maximum(tl.sum(d * d, axis=0) - total * tile_correction, 0.0)

        # The strip's rough mean is its first tile's, which later tiles are near to; the small correction takes up the rest.
        rough = tl.where(count == 0, tile_rough, rough)
        delta = (tile_rough - rough) + (tile_correction - correction)
        share = tl.div_rn(added.to(tl.float32), tl.maximum(count + added, 1).to(tl.float32))
        m2 += tile_m2 + delta * delta * share * count
        correction += delta * share
        count += added

    row = strip * channels + offs_c
    tl.store(roughs_ptr + row, rough, mask=inside)
    tl.store(corrections_ptr + row, correction, mask=inside)
    tl.store(m2s_ptr + row, m2, mask=inside)
    tl.store(counts_ptr + strip, count, mask=tl.program_id(0) % blocks_c == 0)


@triton.jit
def _counted(counts_ptr, start, strips, BLOCK_S: tl.constexpr):
    """BLOCK_S strips from `start`, a multiple of BLOCK_S, on, and how many tokens each counts; in words of 64 bits by twos, as `_kept`'s tokens by eights."""
    offs = tl.arange(0, BLOCK_S)
    if counts_ptr.dtype.element_ty == tl.int64:
        WORDS: tl.constexpr = BLOCK_S // 2
        at = start // 2 + tl.arange(0, WORDS)
        words = tl.load(counts_ptr + at, mask=at < strips // 2, other=0)
        return start + offs % WORDS * 2 + offs // WORDS, tl.reshape(words[None, :] >> 32 * tl.arange(0, 2)[:, None], [BLOCK_S]).to(tl.int32)
    else:
        offs_s = start + offs
        return offs_s, tl.load(counts_ptr + offs_s, mask=offs_s < strips, other=0)


@triton.jit
def _merged(counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, strips, channels, offs_c, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Number of tokens, mean and m2 of this program's channels over all strips; the mean is NaN when no token counts."""
    inside = offs_c < channels
    kept = tl.zeros((BLOCK_S,), tl.int32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, strips, BLOCK_S):
        offs_s, n = _counted(counts_ptr, start, strips, BLOCK_S)
        read = (offs_s < strips)[:, None] & inside[None, :]
        total += n.to(tl.float32)[:, None] * tl.load(roughs_ptr + offs_s[:, None] * channels + offs_c[None, :], mask=read, other=0.0)
        kept += n
    count = tl.sum(kept, axis=0).to(tl.float32)
    rough = tl.div_rn(tl.sum(total, axis=0), count)

    first = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, strips, BLOCK_S):
        offs_s, n = _counted(counts_ptr, start, strips, BLOCK_S)
        n = n.to(tl.float32)
        offsets = offs_s[:, None] * channels + offs_c[None, :]
        read = (offs_s < strips)[:, None] & inside[None, :]
        strip_rough = tl.load(roughs_ptr + offsets, mask=read, other=0.0)
        d = (strip_rough - rough[None, :]) + tl.load(corrections_ptr + offsets, mask=read, other=0.0)
        first += n[:, None] * d
        second += tl.load(m2s_ptr + offsets, mask=read, other=0.0) + n[:, None] * d * d
    d = tl.sum(first, axis=0)
    correction = tl.div_rn(d, count)
    return count, rough + correction, tl.maximum(tl.sum(second, axis=0) - d * correction, 0.0)


@triton.jit
def channel_statistics_fwd_kernel(
    counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, mean_ptr, m2_ptr, strips, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Merges strips: mean and m2 [channels]."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, mean, m2 = _merged(counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, strips, channels, offs_c, BLOCK_S, BLOCK_C)
    tl.store(mean_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(m2_ptr + offs_c, m2, mask=offs_c < channels)


@triton.jit
def channel_loss_fwd_kernel(
    counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, mean_f_ptr, var_f_ptr, mean_q_ptr, var_q_ptr, losses_ptr, strips, channels,
    SQUARED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Merges strips: mean and variance [channels], and the share of the loss that this program's channels have."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    count, mean, m2 = _merged(counts_ptr, roughs_ptr, corrections_ptr, m2s_ptr, strips, channels, offs_c, BLOCK_S, BLOCK_C)
    var = tl.div_rn(m2, count)
    tl.store(mean_q_ptr + offs_c, mean, mask=inside)
    tl.store(var_q_ptr + offs_c, var, mask=inside)
    d_mean = mean - tl.load(mean_f_ptr + offs_c, mask=inside, other=0.0)
    d_var = var - tl.load(var_f_ptr + offs_c, mask=inside, other=0.0)
    loss = d_mean * d_mean + d_var * d_var if SQUARED else tl.abs(d_mean) + tl.abs(d_var)
    tl.store(losses_ptr + tl.program_id(0), tl.div_rn(tl.sum(tl.where(inside, loss, 0.0), axis=0), tl.cast(channels, tl.float32)))


@triton.jit
def _slope(d, SQUARED: tl.constexpr):
    return 2.0 * d if SQUARED else tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))


@triton.jit
def channel_loss_bwd_kernel(
    grad_ptr, x_ptr, mask_ptr, kept_ptr, mean_q_ptr, var_q_ptr, mean_f_ptr, var_f_ptr, grad_x_ptr, tokens, channels,
    SQUARED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """dL/dx of a tile. grad_ptr None: 1. kept_ptr: the number of tokens that the mask keeps; None without a mask."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    offs_c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t, keep = _kept(mask_ptr, (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_T, tokens, BLOCK_T)
    inside = offs_c < channels
    mean = tl.load(mean_q_ptr + offs_c, mask=inside, other=0.0)
    d_mean = mean - tl.load(mean_f_ptr + offs_c, mask=inside, other=0.0)
    d_var = tl.load(var_q_ptr + offs_c, mask=inside, other=0.0) - tl.load(var_f_ptr + offs_c, mask=inside, other=0.0)

    kept = tl.cast(tokens, tl.float32) if kept_ptr is None else tl.load(kept_ptr).to(tl.float32)
    grad = tl.cast(1.0, tl.float32) if grad_ptr is None else tl.load(grad_ptr).to(tl.float32)
    factor = tl.div_rn(grad, tl.cast(channels, tl.float32) * tl.maximum(kept, 1.0))
    offset, slope = factor * _slope(d_mean, SQUARED), 2.0 * factor * _slope(d_var, SQUARED)

    offsets = offs_t[:, None] * channels + offs_c[None, :]
    x = tl.load(x_ptr + offsets, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
    grad_x = tl.where(keep[:, None], offset[None, :] + slope[None, :] * (x - mean[None, :]), 0.0)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(offs_t < tokens)[:, None] & inside[None, :])


def _partials(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts [strips]; rough means, corrections and m2s [strips, C] of the strips of tokens. x and the mask contiguous."""
    channels = x.shape[-1]
    tokens, block_c = x.numel() // channels, min(LAUNCH.block_channels, triton.next_power_of_2(channels))
    blocks_t = triton.cdiv(tokens, LAUNCH.block_tokens)
    tiles = triton.cdiv(blocks_t, LAUNCH.max_strips)
    strips = triton.cdiv(blocks_t, tiles)
    counts = torch.empty(strips, dtype=torch.int32, device=x.device)
    roughs, corrections, m2s = torch.empty(3, strips, channels, dtype=torch.float32, device=x.device)
    channel_partials_fwd_kernel[(strips * triton.cdiv(channels, block_c),)](
        x, _in_words(mask), counts, roughs, corrections, m2s, tokens, channels, tiles,
        BLOCK_T=LAUNCH.block_tokens, BLOCK_C=block_c, num_warps=LAUNCH.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return counts, roughs, corrections, m2s


@registry.register("channel_statistics", "triton", gpu.refuses)
def channel_statistics(x: Tensor, mask: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """See statistics.py. The number of tokens is a Python number: with a mask this waits for the device."""
    channels = x.shape[-1]
    with gpu.on_device_of(x):
        counts, *moments = _partials(x.contiguous(), _contiguous(mask))
        mean, m2 = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        channel_statistics_fwd_kernel[(triton.cdiv(channels, LAUNCH.merge_channels),)](
            _in_words(counts), *moments, mean, m2, len(counts), channels,
            BLOCK_S=LAUNCH.merge_strips, BLOCK_C=LAUNCH.merge_channels, num_warps=LAUNCH.merge_warps, enable_fp_fusion=True,
        )  # fmt: skip
    count = x.numel() // channels if mask is None else int(counts.sum())
    # Without a token the mean is 0 / 0.
    return count, mean.double().nan_to_num(0.0) if count == 0 else mean.double(), m2.double()


@registry.register("channel_loss", "triton", gpu.refuses)
def channel_loss(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    channels = x.shape[-1]
    with gpu.on_device_of(x):
        counts, *moments = _partials(x.contiguous(), _contiguous(mask))
        programs = triton.cdiv(channels, LAUNCH.merge_channels)
        mean_q, var_q = torch.empty(channels, dtype=torch.float32, device=x.device), torch.empty(channels, dtype=torch.float32, device=x.device)
        losses = torch.empty(programs, dtype=torch.float32, device=x.device)
        channel_loss_fwd_kernel[(programs,)](
            _in_words(counts), *moments, mean_f.contiguous(), var_f.contiguous(), mean_q, var_q, losses, len(counts), channels,
            SQUARED=squared, BLOCK_S=LAUNCH.merge_strips, BLOCK_C=LAUNCH.merge_channels, num_warps=LAUNCH.merge_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return losses.sum(), mean_q, var_q


@registry.register("channel_loss_backward", "triton", gpu.refuses)
def channel_loss_backward(
    grad: Tensor, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool
) -> Tensor:
    """See the package's docstring."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    _write_gradient(grad, x, mean_q, var_q, mean_f, var_f, mask, squared, grad_x)
    return grad_x


@registry.register("channel_loss_and_grad", "triton", gpu.refuses)
def channel_loss_and_grad(x: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor) -> Tensor:
    """See the package's docstring."""
    x, mask = x.contiguous(), _contiguous(mask)
    loss, mean_q, var_q = channel_loss(x, mean_f, var_f, mask, squared)
    _write_gradient(None, x, mean_q, var_q, mean_f, var_f, mask, squared, out)
    return loss


def _write_gradient(
    grad: Tensor | None, x: Tensor, mean_q: Tensor, var_q: Tensor, mean_f: Tensor, var_f: Tensor, mask: Tensor | None, squared: bool, out: Tensor
) -> None:
    channels = x.shape[-1]
    tokens, block_c = x.numel() // channels, min(LAUNCH.grad_channels, triton.next_power_of_2(channels))
    num_warps = LAUNCH.grad_wavefronts if torch.version.hip else LAUNCH.grad_warps
    with gpu.on_device_of(x):
        # Left on the device: nothing here waits for it.
        kept = None if mask is None else mask.sum()
        channel_loss_bwd_kernel[(triton.cdiv(tokens, LAUNCH.grad_tokens) * triton.cdiv(channels, block_c),)](
            grad, x.contiguous(), _in_words(_contiguous(mask)), kept, mean_q.contiguous(), var_q.contiguous(), mean_f.contiguous(), var_f.contiguous(),
            out, tokens, channels, SQUARED=squared, BLOCK_T=LAUNCH.grad_tokens, BLOCK_C=block_c, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _in_words(values: Tensor | None) -> Tensor | None:
    """A mask or counts as int64, 8 tokens or 2 strips to each, where their number and address allow it."""
    if values is None or values.nbytes % 8 or values.data_ptr() % 8:
        return values
    return values.view(-1).view(torch.int64)


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
