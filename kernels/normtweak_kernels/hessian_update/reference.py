"""hessian_update in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..precision import matmul_precision


@registry.register("hessian_update", "reference")
def hessian_update(hessian: Tensor, x: Tensor) -> None:
    """See the package's docstring; any float dtypes."""
    # float32 values that are bfloat16 values may be multiplied as such: the products are the same.
    with matmul_precision("medium" if x.dtype == torch.bfloat16 else "highest"):
        x = x.to(hessian.dtype)
        hessian.addmm_(x.t(), x)
