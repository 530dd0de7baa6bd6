"""hessian_update in plain torch: the definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import registry


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's precision of float32 products, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@registry.register("hessian_update", "reference")
def hessian_update(hessian: Tensor, x: Tensor) -> None:
    """See the package's docstring; any float dtypes."""
    # float32 values that are bfloat16 values may be multiplied as such: the products are the same.
    with matmul_precision("medium" if x.dtype == torch.bfloat16 else "highest"):
        x = x.to(hessian.dtype)
        hessian.addmm_(x.t(), x)
