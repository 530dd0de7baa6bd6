"""Mean and variance of each channel, collected over batches."""

from __future__ import annotations

from torch import Tensor

from .reference import kept_tokens


class ChannelStatistics:
    """Per-channel mean and biased variance of [..., C] batches, merged by Chan, Golub and LeVeque (1979).

    Batches are reduced in float32 (around their own mean) and merged in float64: a sum of squares would cancel when a
    channel's mean is large against its deviation, as the massive activations of language models are.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._m2: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of x [..., C] that mask (bool, x's shape without C; None: all) keeps."""
        tokens = kept_tokens(x.detach(), mask)
        added = tokens.shape[0]
        if added == 0:
            return
        mean = tokens.mean(0)
        m2 = (tokens - mean).square().sum(0).double()
        mean = mean.double()
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
