"""gptq_solve in plain torch: the definition, on `gptq_block_update`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry


@registry.register("gptq_solve", "reference")
def gptq_solve(weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None, bits: int, block_size: int) -> Tensor:
    """See the package's docstring; any float dtype. The blocks' op chooses its own body, so that one for a GPU serves here too."""
    k = weight.shape[1]
    columns = torch.arange(k, device=weight.device) if order is None else order
    index = (columns // (k // scales.shape[0])).to(torch.int32)
    work, hinv = weight.index_select(1, columns), hinv.contiguous()
    scales, zeros = scales.clone(memory_format=torch.contiguous_format), zeros.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        torch.ops.normtweak.gptq_block_update(work, hinv, codes, scales, zeros, index, start, stop, bits, False, 0)
    result = torch.empty_like(codes)
    result[:, columns] = codes
    return result
