"""A weight to the codes of its grid: the nearest ones, or with each column's error passed on to the next (GPTQ)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from normtweak_kernels import QuantizedWeight, affine, gptq_solve, group_params, inverse_cholesky

from .config import QuantizeConfig, stored_bits

logger = logging.getLogger(__name__)


def nearest(weight: Tensor, config: QuantizeConfig, importance: Tensor | None = None) -> QuantizedWeight:
    """Round each value of a weight [N, K] to the nearest point of its group's grid. config: this weight's own.

    importance: float32 [K], the mean square of each input channel: ranges are then clipped where that costs least (`config.clip_steps` candidates). Without it
    ranges are plain min-max.
    """
    weight = weight.detach().float()
    scales, zeros = group_params(
        weight,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        clip_steps=0 if importance is None else config.clip_steps,
        importance=importance,
    )
    k = weight.shape[1]
    codes = affine.quantize(weight, affine.expand(scales, k), affine.expand(zeros.float(), k), config.bits).to(torch.uint8)
    return stored(codes, scales, zeros, config)


def stored(codes: Tensor, scales: Tensor, zeros: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """The weight [N, K] of codes on its grid, scales and zeros [G, N], in the bits that it is stored in: 5-bit codes are 8-bit codes that use 32 of the 256 levels."""
    bits = stored_bits(config.bits)
    if config.symmetric:
        return QuantizedWeight(codes + (2 ** (bits - 1) - 2 ** (config.bits - 1)), scales.half(), None, bits)
    return QuantizedWeight(codes, scales.half(), zeros, bits)


class Solver:
    """One Hessian's factor, and the solve of each weight that shares it."""

    def __init__(self, hessian: Tensor, config: QuantizeConfig, name: str, tokens: int = 0) -> None:
        """tokens: how many the Hessian was made of, 0 for one that is exact."""
        diagonal = hessian.diagonal()
        # A column's error costs in proportion to its input's energy: on SmolLM2-135M at W4 per-channel the clip search without these weights
        # makes perplexity worse than no search (61 against 52), with them far better (44).
        self.importance = diagonal / diagonal.mean()
        self.dead = diagonal == 0
        self.order = torch.argsort(diagonal, descending=True, stable=True) if config.act_order else None
        # Of T tokens, a Hessian of K inputs is known so well: with K / T more of damping GPTQ loses less on other text (docs/experiments.md), and an
        # expert's that few tokens reached does no harm.
        uncertain = len(hessian) / tokens if tokens else 0.0
        self.hinv = inverse_factor(hessian, config.damp_percent + uncertain, name, self.order)

    def divided(self, right: Tensor) -> Tensor:
        """right @ H^-1 of rows [N, K], H damped."""
        if self.order is None:
            return right @ self.hinv.t() @ self.hinv
        result = torch.empty_like(right)
        result[:, self.order] = right[:, self.order] @ self.hinv.t() @ self.hinv
        return result

    def quantize(self, weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
        """Codes of a weight [N, K] that minimise tr((W - Q) H (W - Q)^T), greedily. config: this weight's own."""
        weight = weight.detach().float()
        if self.dead.any():
            weight = weight.masked_fill(self.dead, 0.0)
        # Static groups: grids are found on the weights as they are, in their own order, so that a checkpoint needs no g_idx.
        scales, zeros = group_params(
            weight,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            clip_steps=config.clip_steps,
            importance=self.importance,
        )
        codes = gptq_solve(weight, self.hinv, scales, zeros, bits=config.bits, order=self.order, block_size=config.block_size)
        return stored(codes, scales, zeros, config)


def inverse_factor(hessian: Tensor, damp_percent: float, name: str, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1, float32 [K, K], H's rows and columns in `order`.

    An input that is always zero gets 1 on H's diagonal instead. When the factorisation fails the damping is raised tenfold and a
    warning says so. Raises ValueError when damping 1.0 doesn't help.
    """
    diagonal = hessian.diagonal()
    dead = (diagonal == 0).to(hessian.dtype)
    mean = (diagonal + dead).mean()
    while True:
        factor, found = inverse_cholesky(hessian, dead + damp_percent * mean, order=order)
        if found:
            return factor
        more = min(damp_percent * 10, 1.0)
        again = f"trying {more:g}" if damp_percent < 1.0 else "giving up"
        logger.warning("gptq: the Hessian of %s is not positive definite with damping %g; %s", name, damp_percent, again)
        if damp_percent >= 1.0:
            break
        damp_percent = more
    raise ValueError(f"gptq: the Hessian of {name} must be positive definite with damping up to 1.0, got one that isn't")
