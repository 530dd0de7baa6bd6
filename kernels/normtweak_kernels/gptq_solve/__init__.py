"""gptq_solve: all codes of a weight by GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1), on grids given beforehand.

With o = `order` (which column comes as the j-th), U = `hinv` (the upper Cholesky factor of the inverse Hessian of the columns in that
order, H^-1 = U^T U) and group(c) = c // (K // G), for j = 0 .. K - 1:
    c = o[j],   code_c = clamp(round(w_c / scale_group(c)) + zero_group(c), 0, 2**bits - 1),   q_c = (code_c - zero) * scale
    e = (w_c - q_c) / U[j, j],   w_o[l] -= e U[j, l]  for l > j.
This is `gptq_block_update` over all blocks of columns; `block_size` is the width of a block where a body has use for one. It moves
the result by rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

torch.library.define(
    "normtweak::gptq_solve",
    "(Tensor weight, Tensor hinv, Tensor scales, Tensor zeros, Tensor? order, int bits, int block_size) -> Tensor",
)


@torch.library.impl("normtweak::gptq_solve", "default")
def _run(weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None, bits: int, block_size: int) -> Tensor:
    args = (weight, hinv, scales, zeros, order, bits, block_size)
    return registry.select("gptq_solve", *args).run(*args)


@torch.library.register_fake("normtweak::gptq_solve")
def _fake(weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None, bits: int, block_size: int) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def gptq_solve(
    weight: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, order: Tensor | None = None, block_size: int = 128
) -> Tensor:
    """Codes uint8 [N, K] of a weight, in the weight's own column order.

    weight: float32 [N, K]. hinv: float32 [K, K], upper triangular, positive diagonal, its rows and columns in `order`.
    scales, zeros: float32 (float16 values) and uint8 [G, N], with G dividing K. order: int64 [K], a permutation of the columns, None
    for the weight's own.
    Raises ValueError for other shapes, dtypes, bits or block sizes.
    """
    affine.check_bits("gptq_solve", bits)
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    groups = scales.shape[0] if scales.dim() == 2 else 0
    wanted: tuple[tuple[str, Tensor, torch.dtype, tuple[int, ...]], ...] = (
        ("weight", weight, torch.float32, (n, k)),
        ("hinv", hinv, torch.float32, (k, k)),
        ("scales", scales, torch.float32, (groups, n)),
        ("zeros", zeros, torch.uint8, (groups, n)),
    )
    for name, tensor, dtype, shape in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"gptq_solve: {name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if groups == 0 or k % groups:
        raise ValueError(f"gptq_solve: the number of groups must divide K = {k}, got {groups}")
    if order is not None and (tuple(order.shape) != (k,) or order.dtype != torch.int64):
        raise ValueError(f"gptq_solve: order must be int64 [{k}], got {order.dtype} {tuple(order.shape)}")
    if block_size < 1:
        raise ValueError(f"gptq_solve: block_size must be 1 or more, got {block_size}")
    return torch.ops.normtweak.gptq_solve(weight, hinv, scales, zeros, order, bits, block_size)
