"""inverse_cholesky on the CPU: recursive, nearly all of it in products of matrices, csrc/cpu/inverse_cholesky.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, registry


@registry.register("inverse_cholesky", "cpp", native.refuses)
def inverse_cholesky(hessian: Tensor, damping: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    hessian, damping = hessian.contiguous(), damping.contiguous()
    order = None if order is None else order.contiguous()
    factor = torch.empty_like(hessian)
    positive = native.loaded().inverse_cholesky(
        torch.get_num_threads(), native.address(hessian), native.address(damping), native.address(order), native.address(factor), len(damping)
    )
    return factor, torch.tensor(positive)
