"""gptq_block_update in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, registry


@registry.register("gptq_block_update", "reference")
def gptq_block_update(
    weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None,
    start: int, stop: int, bits: int, symmetric: bool, clip_steps: int,
) -> None:  # fmt: skip
    """See the package's docstring; any float dtype, so that tests can run it in float64."""
    group_size = weight.shape[1] // scales.shape[0]
    block = weight[:, start:stop].clone()
    errors = torch.empty_like(block)
    for j in range(stop - start):
        column = start + j
        if group_index is None:
            group = column // group_size
            if column % group_size == 0:
                scale, zero = affine.grid(block[:, j : j + group_size], bits, symmetric, clip_steps)
                scales[group] = scale
                zeros[group] = zero.to(torch.uint8)
        else:
            group = int(group_index[column])
        scale, zero = scales[group].to(weight.dtype), zeros[group].to(weight.dtype)
        code = affine.quantize(block[:, j], scale, zero, bits)
        quantized = (code - zero) * scale
        codes[:, column] = code.to(torch.uint8)
        errors[:, j] = (block[:, j] - quantized) / hinv[column, column]
        block[:, j + 1 :] -= errors[:, j : j + 1] * hinv[column, column + 1 : stop]
        weight[:, column] = quantized
    weight[:, stop:] -= errors @ hinv[start:stop, stop:]
