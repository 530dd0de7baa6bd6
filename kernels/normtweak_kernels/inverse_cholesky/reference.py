"""inverse_cholesky in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry


@registry.register("inverse_cholesky", "reference")
def inverse_cholesky(hessian: Tensor, damping: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the package's docstring; any float dtype. With J the flip, J H J = L L^T gives U = J L^-1 J."""
    damped = hessian + torch.diag(damping)
    if order is not None:
        damped = damped.index_select(0, order).index_select(1, order)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    identity = torch.eye(len(damping), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    found = (info == 0) & torch.isfinite(lower).all() & torch.isfinite(inverse).all()
    return inverse.flip(0, 1).contiguous(), found
