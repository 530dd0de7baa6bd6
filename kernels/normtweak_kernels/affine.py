"""The affine grid that every quantizer rounds to: w ~ (code - zero) * scale, one (scale, zero) per output row and group of K.

Symmetric grids have zero = 2**(bits-1) and scale = 2 max|w| / (2**bits - 1), so the codes are -2**(bits-1) .. 2**(bits-1)-1
around it. Scales are rounded to float16 before any code is chosen, since that is how checkpoints store them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import packing

# The smallest scale: below it float16 has no precision left and a division by the scale would overflow.
MIN_SCALE = 2.0**-24


def check_bits(where: str, bits: int) -> None:
    """Raise ValueError unless a grid of 2**bits levels has codes that a byte holds (2 to 8); `packing.check_bits` says which can be packed as they are."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{where}: bits must be 2 to 8, got {bits}")


def round_scale(scale: Tensor) -> Tensor:
    """Scale as stored, float16, given back in its own dtype; never zero, so that codes are always defined."""
    return scale.clamp(MIN_SCALE, 65504.0).half().to(scale.dtype)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (in the weight's dtype): clamp(round(w / scale) + zero, 0, 2**bits - 1)."""
    return (torch.round(weight / scale) + zero).clamp_(0, 2**bits - 1)


def expand(per_group: Tensor, k: int) -> Tensor:
    """[G, N] parameters -> [N, K], each repeated over its group of K // G columns."""
    return per_group.t().repeat_interleave(k // per_group.shape[0], 1)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(codes - zeros) * scales: codes uint8 [N, K], scales [G, N], zeros uint8 [G, N] or None for 2**(bits-1); result [N, K]."""
    k = codes.shape[1]
    shifted = codes.to(dtype) - (2 ** (bits - 1) if zeros is None else expand(zeros.to(dtype), k))
    return shifted * expand(scales.to(dtype), k)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] on its grid: codes uint8 [N, K], scales float16 [G, N], zeros uint8 [G, N] or None (symmetric)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale; K when there is one per row."""
        return self.codes.shape[1] // self.scales.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for."""
        return dequantize(self.codes, self.scales, self.zeros, self.bits, dtype)

    def pack(self) -> Tensor:
        """The codes in the packed layout of `packing.pack`."""
        return packing.pack(self.codes, self.bits)


# The clip search shrinks the range from 1 down to this factor (measured on SmolLM2-135M at 2 bits).
MIN_CLIP = 0.28


def grid(groups: Tensor, bits: int, symmetric: bool, clip_steps: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero [...] of each group [..., group_size] of values; see `group_params` for the formula and the search."""
    levels = 2**bits - 1
    if symmetric:
        high = groups.abs().amax(-1)
        low = -high
    else:
        high = groups.amax(-1).clamp(min=0)
        low = groups.amin(-1).clamp(max=0)

    def at(factor: float) -> tuple[Tensor, Tensor]:
        scale = round_scale((high - low) * factor / levels)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low * factor / scale).clamp(0, levels)
        return scale, zero

    scale, zero = at(1.0)
    if clip_steps == 0:
        return scale, zero

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        square = ((quantize(groups, scale, zero, bits) - zero) * scale - groups).square()
        return (square if importance is None else square * importance).sum(-1)

    best = error(scale, zero)
    for step in range(1, clip_steps + 1):
        candidate = at(1.0 - step * (1.0 - MIN_CLIP) / clip_steps)
        candidate_error = error(*candidate)
        better = candidate_error < best
        best = torch.where(better, candidate_error, best)
        scale = torch.where(better, candidate[0], scale)
        zero = torch.where(better, candidate[1], zero)
    return scale, zero
