"""Losses between a block's float and quantized output, found by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# (output [B, L, C], target [B, L, C], mask bool [B, L]) -> scalar, differentiable in output
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def find(name: str) -> Loss:
    """The loss called `name`. Raises ValueError for a name that no file has."""
    from . import channel, pointwise

    losses = channel.LOSSES | pointwise.LOSSES
    if name not in losses:
        raise ValueError(f"losses: name must be one of {', '.join(losses)}, got {name}")
    return losses[name]
