"""group_params: the scale and zero of each row's groups, by min-max or by a clip search.

For a group w of a row and a clip factor p in (0, 1], the range is [p * min(w, 0), p * max(w, 0)] (asymmetric) or
p * [-max|w|, max|w|] (symmetric), and
    scale = float16((hi - lo) / (2**bits - 1)),   zero = clamp(round(-lo / scale), 0, 2**bits - 1) or 2**(bits-1).
With `clip_steps` = 0, p = 1. Else p runs over 1 - i * (1 - MIN_CLIP) / clip_steps, i = 0..clip_steps, and the one with the
least sum_k importance_k * (w_k - dequant(quant(w_k)))**2 is kept, the largest p on a tie (source: the grid search of GPTQ's
reference code, arXiv 2210.17323, with squared error; the factors 1.0 to 0.28 are measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

torch.library.define(
    "normtweak::group_params",
    "(Tensor weight, Tensor? importance, int group_size, int bits, bool symmetric, int clip_steps) -> (Tensor, Tensor)",
)


@torch.library.impl("normtweak::group_params", "default")
def _run(weight: Tensor, importance: Tensor | None, group_size: int, bits: int, symmetric: bool, clip_steps: int) -> tuple[Tensor, Tensor]:
    args = (weight, importance, group_size, bits, symmetric, clip_steps)
    return registry.select("group_params", *args).run(*args)


@torch.library.register_fake("normtweak::group_params")
def _fake(weight: Tensor, importance: Tensor | None, group_size: int, bits: int, symmetric: bool, clip_steps: int) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[1] // group_size, weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.uint8)


def group_params(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    clip_steps: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the affine grid of each row and group of `weight`.

    weight: float32 [N, K], finite. group_size: columns per group, a divisor of K, or -1 for one group per row.
    importance: float32 [K], non-negative weights of the columns in the clip search (None: all 1).
    Returns scales float32 [G, N] (each a float16 value) and zeros uint8 [G, N], with G = K / group_size.
    Raises ValueError for other bits, shapes, dtypes or group sizes.
    """
    affine.check_bits("group_params", bits)
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise ValueError(f"group_params: weight must be float32 [N, K], got {weight.dtype} {tuple(weight.shape)}")
    k = weight.shape[1]
    group_size = k if group_size == -1 else group_size
    if group_size < 1 or k % group_size:
        raise ValueError(f"group_params: group_size must divide K = {k}, got {group_size}")
    if clip_steps < 0:
        raise ValueError(f"group_params: clip_steps must be 0 or more, got {clip_steps}")
    if importance is not None and (importance.shape != (k,) or importance.dtype != torch.float32):
        raise ValueError(f"group_params: importance must be float32 [{k}], got {importance.dtype} {tuple(importance.shape)}")
    return torch.ops.normtweak.group_params(weight, importance, group_size, bits, symmetric, clip_steps)
