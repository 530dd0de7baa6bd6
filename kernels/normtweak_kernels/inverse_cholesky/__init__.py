"""inverse_cholesky: the upper Cholesky factor of a damped Hessian's inverse, which GPTQ's error feedback reads.

With H = hessian[o][:, o] + diag(damping[o]), o = `order`: the upper triangular U with a positive diagonal and U^T U = H^-1.
H isn't inverted: H = R R^T with R upper triangular (a Cholesky factor of H with rows and columns reversed) has U = R^-1, so that one
factor and one triangular inverse do (2/3 K^3 operations; H's factor, inverse and that one's factor take K^3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

torch.library.define("normtweak::inverse_cholesky", "(Tensor hessian, Tensor damping, Tensor? order) -> (Tensor, Tensor)")


@torch.library.impl("normtweak::inverse_cholesky", "default")
def _run(hessian: Tensor, damping: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    return registry.select("inverse_cholesky", hessian, damping, order).run(hessian, damping, order)


@torch.library.register_fake("normtweak::inverse_cholesky")
def _fake(hessian: Tensor, damping: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    return hessian.new_empty(hessian.shape), hessian.new_empty((), dtype=torch.bool)


def inverse_cholesky(hessian: Tensor, damping: Tensor, *, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The upper triangular U with U^T U = (hessian[order][:, order] + diag(damping[order]))^-1, and whether there is one.

    hessian: float32 [K, K], symmetric, K at least 1. damping: float32 [K]. order: int64 [K], a permutation, None for 0 .. K - 1.
    Returns U float32 [K, K] and a bool scalar; where that is False the sum isn't positive definite in float32 and U is undefined.
    Raises ValueError for other shapes or dtypes.
    """
    k = hessian.shape[0] if hessian.dim() == 2 else 0
    if k == 0 or hessian.shape != (k, k) or hessian.dtype != torch.float32:
        raise ValueError(f"inverse_cholesky: hessian must be float32 [K, K], got {hessian.dtype} {tuple(hessian.shape)}")
    if tuple(damping.shape) != (k,) or damping.dtype != torch.float32:
        raise ValueError(f"inverse_cholesky: damping must be float32 [{k}], got {damping.dtype} {tuple(damping.shape)}")
    if order is not None and (tuple(order.shape) != (k,) or order.dtype != torch.int64):
        raise ValueError(f"inverse_cholesky: order must be int64 [{k}], got {order.dtype} {tuple(order.shape)}")
    return torch.ops.normtweak.inverse_cholesky(hessian, damping, order)
