"""group_params on the CPU: rows are the vector's lanes, csrc/cpu/group_params.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, native, registry


def _refuses(weight: Tensor, importance: Tensor | None, *rest: object) -> str | None:
    return native.refuses(weight, importance)


@registry.register("group_params", "cpp", _refuses)
def group_params(weight: Tensor, importance: Tensor | None, group_size: int, bits: int, symmetric: bool, clip_steps: int) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    n, k = weight.shape
    weight = weight.contiguous()
    importance = None if importance is None else importance.contiguous()
    scales = torch.empty(k // group_size, n, dtype=torch.float32, device="cpu")
    zeros = torch.empty(k // group_size, n, dtype=torch.uint8, device="cpu")
    if n:
        native.loaded().group_params(
            torch.get_num_threads(), native.address(weight), native.address(importance), n, k, group_size, bits, symmetric, clip_steps,
            affine.MIN_CLIP, native.address(scales), native.address(zeros),
        )  # fmt: skip
    return scales, zeros
