"""Mean and variance of each channel, collected over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..precision import FLOATS


def check_tokens(op: str, x: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless x is float16, bfloat16, float32 or float64 [..., C] and mask, if any, bool of x's shape without C."""
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be float16, bfloat16, float32 or float64 [..., C], got {x.dtype} {tuple(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"{op}: mask must be bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")


class ChannelStatistics:
    """Per-channel mean and biased variance of [..., C] batches, merged by Chan, Golub and LeVeque (1979).

    Batches are reduced in float32 (around their own mean) and merged in float64: a sum of squares would cancel when a
    channel's mean is large against its deviation, as the massive activations of language models are. The reduction is
    `channel_loss`'s own, so that equal tokens give equal statistics.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._m2: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of x [..., C] that mask (bool, x's shape without C; None: all) keeps.

        Raises ValueError when x isn't floating point [..., C], has other channels than the batches before, or the mask doesn't fit x.
        """
        check_tokens("ChannelStatistics", x, mask)
        if self._mean is not None and x.shape[-1] != len(self._mean):
            raise ValueError(f"ChannelStatistics: x must be [..., {len(self._mean)}], got {tuple(x.shape)}")
        if x.numel() == 0:
            return
        x = x.detach()
        added, mean, m2 = registry.select("channel_statistics", x, mask).run(x, mask)
        if added == 0:
            return
        if self._mean is None or self._m2 is None:
            self.count, self._mean, self._m2 = added, mean, m2
            return
        total = self.count + added
        delta = mean - self._mean
        self._mean = self._mean + delta * (added / total)
        self._m2 = self._m2 + m2 + delta.square() * (self.count * added / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean, float32 [C]. Raises ValueError before the first token."""
        return self._required(self._mean).float()

    @property
    def var(self) -> Tensor:
        """Biased variance, float32 [C]. Raises ValueError before the first token."""
        return (self._required(self._m2) / self.count).float()

    def _required(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("ChannelStatistics: needs at least one token, got none")
        return value
