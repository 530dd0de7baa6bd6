"""group_params in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, registry


@registry.register("group_params", "reference")
def group_params(weight: Tensor, importance: Tensor | None, group_size: int, bits: int, symmetric: bool, clip_steps: int) -> tuple[Tensor, Tensor]:
    """See the package's docstring; any float dtype."""
    groups = weight.unflatten(1, (-1, group_size))  # [N, G, group_size]
    cost = None if importance is None else importance.to(weight.dtype).view(1, -1, group_size)
    scale, zero = affine.grid(groups, bits, symmetric, clip_steps, cost)
    return scale.t().contiguous(), zero.t().contiguous().to(torch.uint8)
