"""gptq_block_update: one block of columns of GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1).

With U = `hinv`, the upper Cholesky factor of the inverse Hessian (H^-1 = U^T U), for each column j of [start, stop):
    code_j = clamp(round(w_j / scale) + zero, 0, 2**bits - 1),   q_j = (code_j - zero) * scale
    e_j = (w_j - q_j) / U[j, j],   w_l -= e_j U[j, l]  for j < l < stop
and at the end of the block  W[:, stop:] -= E U[start:stop, stop:].

The grid of column j comes from `scales` and `zeros`: given, with `group_index` naming each column's group (static groups, the
column order is free), or, with `group_index` None, found when the loop reaches the group's first column, from the weight as
updated so far (`group_params` says how, with min-max or clip-searched ranges).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, gpu, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

registry.register_lazily("gptq_block_update", "triton", f"{__name__}.triton_kernel", gpu.refuses)

torch.library.define(
    "normtweak::gptq_block_update",
    "(Tensor(a!) weight, Tensor hinv, Tensor(b!) codes, Tensor(c!) scales, Tensor(d!) zeros, Tensor? group_index, "
    "int start, int stop, int bits, bool symmetric, int clip_steps) -> ()",
)


@torch.library.impl("normtweak::gptq_block_update", "default")
def _run(
    weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None,
    start: int, stop: int, bits: int, symmetric: bool, clip_steps: int,
) -> None:  # fmt: skip
    args = (weight, hinv, codes, scales, zeros, group_index, start, stop, bits, symmetric, clip_steps)
    registry.select("gptq_block_update", *args).run(*args)


@torch.library.register_fake("normtweak::gptq_block_update")
def _fake(
    weight: Tensor, hinv: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor | None,
    start: int, stop: int, bits: int, symmetric: bool, clip_steps: int,
) -> None:  # fmt: skip
    return None


def gptq_block_update(
    weight: Tensor,
    hinv: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    start: int,
    stop: int,
    *,
    bits: int,
    group_index: Tensor | None = None,
    symmetric: bool = True,
    clip_steps: int = 0,
) -> None:
    """Quantize columns [start, stop) of `weight` in place and pass their error on to the columns after them.

    weight: float32 [N, K], contiguous; columns before `start` are left alone, those in the block become their quantized values.
    hinv: float32 [K, K], upper triangular, positive diagonal. codes: uint8 [N, K], the block's columns are written.
    scales, zeros: float32 (float16 values) and uint8 [G, N], with G dividing K. Read when `group_index` (int32 [K], values below G) is given;
    else written for each group of K / G columns that starts in the block, which must hold whole groups.
    Raises ValueError for other shapes, dtypes, bits or ranges.
    """
    affine.check_bits("gptq_block_update", bits)
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    wanted: tuple[tuple[str, Tensor, torch.dtype, tuple[int, ...]], ...] = (
        ("weight", weight, torch.float32, (n, k)),
        ("hinv", hinv, torch.float32, (k, k)),
        ("codes", codes, torch.uint8, (n, k)),
        ("scales", scales, torch.float32, (scales.shape[0], n)),
        ("zeros", zeros, torch.uint8, (scales.shape[0], n)),
    )
    for name, tensor, dtype, shape in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            got = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ' not contiguous'}"
            raise ValueError(f"gptq_block_update: {name} must be contiguous {dtype} {shape}, got {got}")
    groups = scales.shape[0]
    if groups == 0 or k % groups:
        raise ValueError(f"gptq_block_update: the number of groups must divide K = {k}, got {groups}")
    if not 0 <= start < stop <= k:
        raise ValueError(f"gptq_block_update: start, stop must satisfy 0 <= start < stop <= {k}, got {start}, {stop}")
    if group_index is not None:
        if tuple(group_index.shape) != (k,) or group_index.dtype != torch.int32:
            raise ValueError(f"gptq_block_update: group_index must be int32 [{k}], got {group_index.dtype} {tuple(group_index.shape)}")
    elif start % (k // groups) or stop % (k // groups):
        raise ValueError(
            f"gptq_block_update: start and stop must be multiples of the group size {k // groups} when the groups' grids are found here, "
            f"got {start}, {stop}"
        )
    if clip_steps < 0:
        raise ValueError(f"gptq_block_update: clip_steps must be 0 or more, got {clip_steps}")
    torch.ops.normtweak.gptq_block_update(weight, hinv, codes, scales, zeros, group_index, start, stop, bits, symmetric, clip_steps)
