"""gptq_solve on the CPU in one call: csrc/cpu/gptq_block_update.cpp, rows solved in tiles that stay in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, registry


def _refuses(weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None, *rest: object) -> str | None:
    return native.refuses(weight, hinv, scales, zeros, order)


@registry.register("gptq_solve", "cpp", _refuses)
def gptq_solve(weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None, bits: int, block_size: int) -> Tensor:
    """See the package's docstring. Columns are halved down to a fixed width, whatever block_size says."""
    n, k = weight.shape
    groups = scales.shape[0]
    codes = torch.empty(n, k, dtype=torch.uint8, device="cpu")
    if n == 0:
        return codes
    weight, hinv, scales, zeros = (tensor.contiguous() for tensor in (weight, hinv, scales, zeros))
    order = None if order is None else order.contiguous()
    native.loaded().gptq_solve(
        torch.get_num_threads(), native.address(weight), native.address(hinv), native.address(scales), native.address(zeros),
        native.address(order), native.address(codes), n, k, groups, bits,
    )  # fmt: skip
    return codes
