"""The paper's loss: each channel's mean and variance (Norm Tweaking, arXiv 2309.02784, eq. 2)."""

from __future__ import annotations

from torch import Tensor

from normtweak_kernels import ChannelStatistics, channel_loss


def _statistics(target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    statistics = ChannelStatistics()
    statistics.update(target, mask)
    return statistics.mean, statistics.var


def channel(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1/C sum_c |mean difference| + |variance difference|."""
    return channel_loss(output, *_statistics(target, mask), mask)


def channel_squared(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same with squared differences."""
    return channel_loss(output, *_statistics(target, mask), mask, form="squared")


LOSSES = {"channel": channel, "channel_squared": channel_squared}
