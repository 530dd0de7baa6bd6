"""hessian_update: adds a batch of activations to a linear's Hessian, H += X^T X, in float32.

GPTQ's layer-wise objective ||(W - Q) X^T||^2 has the Hessian X^T X for every row of W (Frantar et al., arXiv 2210.17323). It is
symmetric, so that half of the products are enough: the lower triangle is kept up to date, and `mirror_lower` completes it once.
Products of float16 and bfloat16 values are exact in float32; sums are float32, as a bfloat16 sum makes H indefinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

registry.register_lazily("hessian_update", "triton", f"{__name__}.triton_kernel", gpu.refuses)

torch.library.define("normtweak::hessian_update", "(Tensor(a!) hessian, Tensor x) -> ()")


@torch.library.impl("normtweak::hessian_update", "default")
def _run(hessian: Tensor, x: Tensor) -> None:
    registry.select("hessian_update", hessian, x).run(hessian, x)


@torch.library.register_fake("normtweak::hessian_update")
def _fake(hessian: Tensor, x: Tensor) -> None:
    return None


def hessian_update(hessian: Tensor, x: Tensor) -> None:
    """Add x^T x to the lower triangle of `hessian`, in place; what stands above its diagonal is undefined afterwards.

    hessian: float32 [K, K], contiguous. x: [..., K] of any float dtype, all but the last dimension are tokens.
    Raises ValueError for other shapes or dtypes.
    """
    k = x.shape[-1] if x.dim() else 0
    if tuple(hessian.shape) != (k, k) or hessian.dtype != torch.float32 or not hessian.is_contiguous():
        got = f"{hessian.dtype} {tuple(hessian.shape)}{'' if hessian.is_contiguous() else ' not contiguous'}"
        raise ValueError(f"hessian_update: hessian must be contiguous torch.float32 {(k, k)} for x {tuple(x.shape)}, got {got}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"hessian_update: x must be of a float dtype, got {x.dtype}")
    torch.ops.normtweak.hessian_update(hessian, x.reshape(-1, k))


def mirror_lower(matrix: Tensor) -> Tensor:
    """The square matrix itself, its upper triangle made the mirror image of its lower one, in place."""
    block = 256  # a block and its mirror image fit into a cache
    for start in range(0, len(matrix), block):
        stop = start + block
        diagonal = matrix[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).t())
        matrix[:start, start:stop].copy_(matrix[start:stop, :start].t())
    return matrix
