"""gptq_block_update on the CPU: csrc/cpu/gptq_block_update.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, native, registry


def _refuses(weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None, *rest: object) -> str | None:
    return native.refuses(weight, hinv, codes, scales, zeros, group_index)


@registry.register("gptq_block_update", "cpp", _refuses)
def gptq_block_update(
    weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None,
    start: int, stop: int, bits: int, symmetric: bool, clip_steps: int,
) -> None:  # fmt: skip
    """See the package's docstring."""
    n, k = weight.shape
    if n == 0:
        return
    group_index = None if group_index is None else group_index.contiguous()
    native.loaded().gptq_block_update(
        torch.get_num_threads(), native.address(weight), native.address(hinv), native.address(codes), native.address(scales), native.address(zeros),
        native.address(group_index), n, k, scales.shape[0], start, stop, bits, symmetric, clip_steps, affine.MIN_CLIP,
    )  # fmt: skip
